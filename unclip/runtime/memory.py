"""Networks that are in memory only while they work, and what to say when memory does not suffice."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..io.checkpoints import load_component, readable_size


class Residency:
    """Which of a model folder's networks hold their weights; the others are empty shells on the meta device.

    `networks` are the shells by name, to build a pipeline from. Their dtype and memory layout may be changed as those of any
    network: weights take them over when they come. `device` is where they come to.
    """

    def __init__(
        self, folder: Path, parts: Mapping[str, Sequence[str]], dtype: torch.dtype | None = None, variant: str | None = None
    ):
        """`parts` names the networks with library and class, as model_index.json does."""
        self.folder, self.parts, self.variant = folder, dict(parts), variant
        self.device = torch.device("cpu")
        self.networks: dict[str, nn.Module] = {}
        for name in self.parts:
            network = self._load(name, dtype)
            _empty(network)
            self.networks[name] = network
        self.present: set[str] = set()

    def only(self, *names: str) -> None:
        """Have the weights of these networks in memory, and no others'."""
        for name in self.present - set(names):
            _empty(self.networks[name])
        self.present &= set(names)
        for name in names:
            if name in self.networks and name not in self.present:
                network = self.networks[name]
                loaded = self._load(name).state_dict()
                shells = network.state_dict()
                weights = {k: torch.empty_like(shells[k], device=self.device).copy_(v) for k, v in loaded.items()}
                network.load_state_dict(weights, assign=True)
                network.to(self.device)  # the tables that no file holds, as of positions
                self.present.add(name)

    def _load(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        return load_component(self.folder / name, *self.parts[name], dtype=dtype, variant=self.variant)


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


def _empty(network: nn.Module) -> None:
    """Leave a network's shapes, dtypes and layouts, and let go of its weights."""
    network.load_state_dict({k: torch.empty_like(v, device="meta") for k, v in network.state_dict().items()}, assign=True)
