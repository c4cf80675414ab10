"""Teaching a decoder what its caption's names look like, and where in the image each of them is."""

# B batch, T text tokens, P places to an image's side, D embedding dimension

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.scenes import IconSet
from ...diffusion.schedules import masked_mean
from .frozen_clip import FrozenCLIP

TOGETHER = 8  # icons that are embedded at once


class IconEmbeddings(nn.Module):
    """CLIP's embeddings of single icons, each computed once, always in the same groups of `TOGETHER`, so that a resumed run
    has the same ones to the last bit."""

    def __init__(self, icons: IconSet, frozen: FrozenCLIP):
        super().__init__()
        self.icons, self.frozen = icons, frozen
        # no buffers: DDP would copy the first process's to all
        self.embeds, self.known = torch.zeros(len(icons), frozen.dim), torch.zeros(len(icons), dtype=torch.bool)
        self.complete = False

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings [..., D] of the icons `rows`; of none, -1, whatever they may be.

        On a CPU only those of `rows` are computed; on other devices, where reading `rows` would synchronise, those of all
        icons at the first call.
        """
        self.embeds = self.embeds.to(rows.device)
        if not self.complete:
            wanted = rows.unique() if rows.device.type == "cpu" else torch.arange(len(self.icons))
            missing = wanted[(wanted >= 0) & ~self.known[wanted]]
            for start in (missing // TOGETHER * TOGETHER).unique().tolist():
                together = range(start, min(start + TOGETHER, len(self.icons)))
                images = self.icons.on_white(together).to(rows.device, non_blocking=True)
                self.embeds[start : together.stop] = self.frozen.image(images * 2 - 1)
                self.known[start : together.stop] = True
            self.complete = bool(self.known.all())
        return self.embeds[rows]


def names_two(names: Tensor, sides: Tensor) -> Tensor:
    """Which rows [B] name two things and say where each is; `names` [B, T] and `sides` [B, P, P] as in `Grounding`."""
    return (names > 0).any(1) & (names < 0).any(1) & (sides != 0).flatten(1).any(1)


def name_distances(guessed: Tensor, names: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine of the image embeddings predicted for a name's tokens, `guessed` [B, T, D], and CLIP's; and which rows count.

    `names` [B, T] and `embeds` [B, 2, D] are as `Grounding` has them. Both results are [B, 2]: of the first name and of the
    second. What does not count is 0.
    """
    off = [1 - F.cosine_similarity(guessed.float(), embeds[:, number, None], dim=-1) for number in (0, 1)]
    pairs = [mean_over_tokens(names == sign, values) for sign, values in zip((1, -1), off, strict=True)]
    distances, counted = (torch.stack(part, 1) for part in zip(*pairs, strict=True))
    return distances, counted


def mean_over_tokens(tokens: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Means [B] of `values` [B, T] over the `tokens` [B, T] bool of each row, 0 where there are none; and where there are."""
    return (values * tokens).sum(1) / tokens.sum(1).clamp_min(1), tokens.any(1)


@dataclass
class Grounding:
    """The grounding loss of a decoder and its `text_proj`, from their outputs on a batch.

    `names` [B, T] has 1 for the text tokens of a caption's first name, -1 for those of its second, 0 elsewhere. `sides`
    [B, P, P] has 1 where the first thing alone covers the image, -1 where the second does, 0 elsewhere. `embeds` [B, 2, D]
    are CLIP's embeddings of the two. `shares` of each attention layer [B, h*w] say how the decoder's pixels divide between
    the names, and `guess` [B, T, D] are the image embeddings that `text_proj` predicts for the tokens, None where it does not.
    """

    names: Tensor
    sides: Tensor
    embeds: Tensor
    shares: Sequence[Tensor] = ()
    guess: Tensor | None = None

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch, to which examples that name nothing add 0, and the means over those that do (NaN of none).

        "where" is the cross-entropy of which of the two names a pixel attends to (all heads together, other tokens left out),
        over the pixels that one of the things covers alone and over the layers; "what" is 1 - cosine of a name's tokens.
        """
        loss, metrics = self.embeds.new_zeros(()), {}
        if self.shares:
            where = self.where()
            loss, metrics["where"] = (
                loss + where.sum() / len(where),
                masked_mean(where.detach(), names_two(self.names, self.sides)),
            )
        if self.guess is not None:
            what, named = name_distances(self.guess, self.names, self.embeds)
            loss, metrics["what"] = loss + what.sum() / len(what), masked_mean(what.detach(), named)
        return loss, metrics

    def where(self) -> Tensor:
        """ "where" of each row [B], 0 of those that do not say where two things are."""
        counted = names_two(self.names, self.sides)
        found = []
        for shares in self.shares:
            sides = F.adaptive_avg_pool2d(self.sides[:, None].float(), math.isqrt(shares.shape[1])).flatten(1)  # [B, h*w]
            right = torch.where(sides > 0, shares, 1 - shares).clamp_min(1e-6)
            covered = torch.where(counted, sides.abs().sum(1), 1)
            found.append(-(sides.abs() * right.log()).sum(1) / covered)
        return torch.where(counted, torch.stack(found).mean(0), 0)
