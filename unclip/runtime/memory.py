"""Networks whose weights are offloaded, and messages about a lack of memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers.hooks.group_offloading import ModuleGroup


@contextmanager
def onloaded(network: nn.Module) -> Iterator[None]:
    """In this context the parameters that a network itself holds are on its device; offloading moves them for `forward` only.

    `forward` must not be called here: it offloads them when it ends.
    """
    hook, group = getattr(network, "_hf_hook", None), _offload_group(network)
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


def _offload_group(network: nn.Module) -> "ModuleGroup | None":
    """The group that group offloading moves before and after a network's `forward`; None without it."""
    hooks = getattr(network, "_diffusers_hook", None)
    hook = hooks.get_hook("group_offloading") if hooks is not None else None
    return None if hook is None else hook.group


def out_of_memory(error: Exception) -> str | None:
    """The size of a failed allocation, as text ("2.00 GiB"); None for an error of another kind."""
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if isinstance(error, torch.OutOfMemoryError):
        return " ".join(found.groups()) if found else "an unknown amount"
    if found is None or "can't allocate memory" not in str(error):
        return None
    return readable_size(int(found[1]))


def readable_size(count: int) -> str:
    """A number of bytes as text: "1.5 MB"."""
    size: float = count
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"
