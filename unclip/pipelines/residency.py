"""Networks that are in memory only while their stage runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..io.checkpoints import load_component


class Residency:
    """The networks of a model folder, of which only some have their weights; the others are on the meta device.

    `networks` are all of them by name, to build a pipeline with. Their dtype and memory layout may be changed as those of any
    network: weights are loaded in these, to `device`.
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
        """Load the weights of these networks, and drop those of all others."""
        for name in self.present - set(names):
            _empty(self.networks[name])
        self.present &= set(names)
        for name in names:
            if name in self.networks and name not in self.present:
                network = self.networks[name]
                loaded = self._load(name).state_dict()
                targets = network.state_dict()
                weights = {k: torch.empty_like(targets[k], device=self.device).copy_(v) for k, v in loaded.items()}
                network.load_state_dict(weights, assign=True)
                network.to(self.device)  # tables that no file holds, such as of positions
                self.present.add(name)

    def _load(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        library, class_name = self.parts[name]
        return load_component(self.folder / name, library, class_name, dtype=dtype, variant=self.variant)


def _empty(network: nn.Module) -> None:
    """Move a network to the meta device, with its shapes, dtypes and layouts."""
    network.load_state_dict({k: torch.empty_like(v, device="meta") for k, v in network.state_dict().items()}, assign=True)
