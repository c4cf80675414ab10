"""Averages of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .sharding import local_shard


class PowerEMA:
    """Average of the weights with a power-function profile (EDM2, arXiv 2312.02696, equations 1-4).

    beta_t = (1 - 1/t)^(gamma + 1), with gamma such that the profile's standard deviation is `width` of the training; a
    `decay` above 0 bounds beta_t, which past the first steps makes an exponential average of it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], width: float, decay: float = 0.0):
        self.shadow = {n: p.detach().clone().float() for n, p in parameters.items()}
        self.decay = decay
        width = width or 0.1
        roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
        self.gamma = float(roots.real.max())

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Average in the weights after step `step` (from 1)."""
        beta = min((1 - 1 / step) ** (self.gamma + 1), self.decay or 1.0)
        weights = [p if p.dtype == torch.float32 else p.float() for p in parameters.values()]
        torch._foreach_lerp_([self.shadow[n] for n in parameters], weights, 1 - beta)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from saved averages, of which each process keeps its shard.

        Raises ValueError for averages of other weights.
        """
        if averages.keys() != self.shadow.keys():
            raise ValueError("has no average of these weights: ema or what is trained was set otherwise then")
        self.shadow = {name: local_shard(averages[name], shadow) for name, shadow in self.shadow.items()}

    @contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within a `with`, the averaged weights replace the trained ones."""
        weights = [p.detach() for p in parameters.values()]
        trained = [torch.empty_like(w) for w in weights]
        torch._foreach_copy_(trained, weights)
        try:
            torch._foreach_copy_(weights, [self.shadow[n] for n in parameters])
            yield
        finally:
            torch._foreach_copy_(weights, trained)
