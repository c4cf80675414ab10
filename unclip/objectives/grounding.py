"""Teaching a decoder where the things are that a caption names, by what its pixels attend to."""

# B batch, N pixels of a layer, M context tokens, T text tokens, H heads, D channels of a head

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.blocks import Attention, AttentionFunction


class Grounding:
    """Watches a network's attention to its context while it is entered, and says how often it is to the wrong name.

    `names` [B, T] has 1 where a text token names what covers the pixels with `sides` [B, P, P] 1, -1 where it names what
    covers those with -1, 0 elsewhere. The text tokens are the last of the context, the pixels those of square pictures.
    """

    def __init__(self, network: nn.Module, names: Tensor, sides: Tensor):
        told = (names > 0).any(1) & (names < 0).any(1) & (sides != 0).flatten(1).any(1)
        self.rows = told.nonzero()[:, 0]
        self.names, self.sides = names[self.rows, None, None], sides[self.rows, None].float()
        self.layers = [m for m in network.modules() if isinstance(m, Attention) and m.context_kv is not None]
        self.seen: list[Tensor] = []

    def __enter__(self) -> "Grounding":
        self.functions = [layer.function for layer in self.layers]
        for layer in self.layers:
            layer.function = self._watched(layer.function)
        return self

    def __exit__(self, *error: Any) -> None:
        for layer, function in zip(self.layers, self.functions, strict=True):
            layer.function = function

    def losses(self) -> Tensor:
        """Means over the layers, one for each example that names two things: [at most B].

        A layer's loss is the cross-entropy of which of the two names a pixel attends to (all heads together, other tokens
        left out), over the pixels that one of the things covers alone; 0 without mistakes.
        """
        return torch.stack(self.seen).mean(0) if self.seen else self.sides.new_zeros(0)

    def _watched(self, function: AttentionFunction) -> AttentionFunction:
        def watched(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            if len(self.rows):
                self.seen.append(self._mistaken(query, key))
            return function(query, key, value, mask)

        return watched

    def _mistaken(self, query: Tensor, key: Tensor) -> Tensor:
        """The loss of each row by one layer's queries [B, N, H, D] and keys [B, M + N, H, D]."""
        pixels, side = query.shape[1], math.isqrt(query.shape[1])
        text = key[self.rows, key.shape[1] - pixels - self.names.shape[-1] : key.shape[1] - pixels].float()  # [rows, T, H, D]
        scores = torch.einsum("bnhd,bthd->bhnt", query[self.rows].float(), text) / math.sqrt(query.shape[-1])
        shares = scores.masked_fill(self.names == 0, -torch.inf).softmax(-1)
        first = (shares * (self.names > 0)).sum(-1).mean(1)  # [rows, N]
        sides = F.adaptive_avg_pool2d(self.sides, side).flatten(1)  # [rows, N]
        right = torch.where(sides > 0, first, 1 - first).clamp_min(1e-6)
        return -(sides.abs() * right.log()).sum(1) / sides.abs().sum(1)
