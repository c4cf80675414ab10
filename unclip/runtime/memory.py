"""Networks whose weights are offloaded, and what to say when memory does not suffice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def at_hand(network: nn.Module) -> Iterator[None]:
    """While this is open, a network's own parameters are where it runs; offloading would bring them for `forward` alone.

    `forward` itself sends them away when it ends: it is not to be called in here.
    """
    hook, group = getattr(network, "_hf_hook", None), _own_group(network)
    if hook is not None:
        hook.pre_forward(network)
    if group is not None:
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()
    try:
        yield
    finally:
        if group is not None:
            group.offload_()
        if hook is not None:
            hook.post_forward(network, None)


def _own_group(network: nn.Module) -> Any:
    """What group offloading moves when a network's own `forward` is called, and when it ends; None without it."""
    hooks = getattr(network, "_diffusers_hook", None)
    hook = hooks.get_hook("group_offloading") if hooks is not None else None
    return None if hook is None else hook.group


def out_of_memory(error: Exception) -> str | None:
    """How much memory was asked for in vain, for people ("2.00 GiB"); None for an error of another kind."""
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if isinstance(error, torch.OutOfMemoryError):
        return " ".join(found.groups()) if found else "an unknown amount"
    if found is None or "can't allocate memory" not in str(error):
        return None
    return readable_size(int(found[1]))


def readable_size(count: int) -> str:
    """A number of bytes for people: "1.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
