"""Teaching a decoder what its caption's names look like, and where in the picture each of them is."""

# B batch, N pixels of a layer, M context tokens, T text tokens, H heads, C channels of a head, D embedding dimension

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder import of_context
from prior.blocks import Attention, AttentionFunction

from ...data.scenes import IconSet
from .frozen_clip import FrozenCLIP

TOGETHER = 8  # icons


class IconEmbeddings(nn.Module):
    """CLIP's embeddings of single icons, asked for once, with the same `TOGETHER` every time: they depend on nothing else."""

    def __init__(self, icons: IconSet, frozen: FrozenCLIP):
        super().__init__()
        self.icons, self.frozen = icons, frozen
        self.embeds = torch.full((len(icons), frozen.dim), torch.nan)  # no buffer: DDP would lay the first process's over all

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings [..., D] of the icons `rows`; of none, -1, whatever it may be."""
        self.embeds = self.embeds.to(rows.device)
        wanted = rows.unique()
        missing = wanted[(wanted >= 0) & self.embeds[wanted].isnan().any(1)]
        for start in (missing // TOGETHER * TOGETHER).unique().tolist():
            pictures = self.icons.on_white(range(start, min(start + TOGETHER, len(self.icons)))).to(rows.device)
            self.embeds[start : start + TOGETHER] = self.frozen.image(pictures * 2 - 1)
        return self.embeds[rows]


def of_two(names: Tensor, sides: Tensor) -> Tensor:
    """Which rows of a batch say where each of two things is, of `names` [B, T] and `sides` [B, P, P] as in `Grounding`."""
    return ((names > 0).any(1) & (names < 0).any(1) & (sides != 0).flatten(1).any(1)).nonzero()[:, 0]


def unlike(guessed: Tensor, names: Tensor, alone: Tensor) -> Tensor:
    """1 - cosine between what a name's tokens are guessed to look like, `guessed` [B, T, D], and what it does: of all names.

    `names` [B, T] and `alone` [B, 2, D] are as `Grounding` has them.
    """
    found = []
    for number, sign in enumerate((1, -1)):
        said = (names == sign).any(1)
        off = 1 - F.cosine_similarity(guessed[said].float(), alone[said, number, None], dim=-1)
        found.append(mean_over(names[said] == sign, off))
    return torch.cat(found)


def mean_over(tokens: Tensor, values: Tensor) -> Tensor:
    """Means [B] of `values` [B, T] over the `tokens` [B, T] bool of each row."""
    return (values * tokens).sum(1) / tokens.sum(1)


class Grounding:
    """Watches a decoder and its `text_proj` while it is entered, and says how far off they are.

    `names` [B, T] has 1 for the text tokens of a caption's first name, -1 for those of its second, 0 elsewhere. `sides`
    [B, P, P] has 1 where the first thing alone covers the picture, -1 where the second does, 0 elsewhere. `alone` [B, 2, D]
    are CLIP's embeddings of the two.
    """

    def __init__(self, decoder: nn.Module, project: nn.Module, names: Tensor, sides: Tensor, alone: Tensor):
        self.project, self.names, self.alone = project, names, alone
        self.rows = of_two(names, sides)
        self.sides = sides[self.rows, None].float()
        self.layers = [m for m in decoder.modules() if isinstance(m, Attention) and m.context_kv is not None]
        self.where: list[Tensor] = []  # of each layer [rows]
        self.what: list[Tensor] = []  # of the names in the batch

    def __enter__(self) -> "Grounding":
        self.functions = [layer.function for layer in self.layers]
        for layer in self.layers:
            layer.function = self._watched(layer.function)
        self.hooks = [self.project.register_forward_pre_hook(self._told, with_kwargs=True)]
        if self.project.text_to_image is not None:
            self.hooks.append(self.project.text_to_image.register_forward_hook(self._guessed))
        return self

    def __exit__(self, *error: Any) -> None:
        for layer, function in zip(self.layers, self.functions, strict=True):
            layer.function = function
        for hook in self.hooks:
            hook.remove()

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch, to which examples that name nothing add 0, and the means of those that do.

        "where" is the cross-entropy of which of the two names a pixel attends to (all heads together, other tokens left out),
        over the pixels that one of the things covers alone and over the layers; "what" is 1 - cosine of a name's tokens.
        """
        loss, shown = self.sides.sum() * 0, {}
        if self.where:
            where = torch.stack(self.where).mean(0)  # [rows]
            loss, shown["where"] = loss + where.sum() / len(self.names), where.detach().mean()
        if len(what := torch.cat([self.sides.new_zeros(0), *self.what])):
            loss, shown["what"] = loss + what.sum() / len(self.names), what.detach().mean()
        return loss, shown

    def _told(self, module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        self.names = self.names[:, : named["text_encoder_hidden_states"].shape[1]]  # the rest is padding in every row
        self.of_context = of_context(self.project, self.names[self.rows], 0)[:, None, None]  # [rows, 1, 1, M]

    def _guessed(self, module: nn.Module, inputs: tuple, guessed: Tensor) -> None:
        self.what.append(unlike(guessed, self.names, self.alone))

    def _watched(self, function: AttentionFunction) -> AttentionFunction:
        def watched(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            if len(self.rows):
                self.where.append(self._mistaken(query, key))
            return function(query, key, value, mask)

        return watched

    def _mistaken(self, query: Tensor, key: Tensor) -> Tensor:
        """ "where" of each row by one layer's queries [B, N, H, C] and keys [B, M + N, H, C]."""
        pixels, side = query.shape[1], math.isqrt(query.shape[1])
        context = key[self.rows, : key.shape[1] - pixels].float()  # [rows, M, H, C]
        scores = torch.einsum("bnhc,bmhc->bhnm", query[self.rows].float(), context) / math.sqrt(query.shape[-1])
        shares = scores.masked_fill(self.of_context == 0, -torch.inf).softmax(-1)
        first = (shares * (self.of_context > 0)).sum(-1).mean(1)  # [rows, N]
        sides = F.adaptive_avg_pool2d(self.sides, side).flatten(1)  # [rows, N]
        right = torch.where(sides > 0, first, 1 - first).clamp_min(1e-6)
        return -(sides.abs() * right.log()).sum(1) / sides.abs().sum(1)
