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

TOGETHER = 8  # icons


class IconEmbeddings(nn.Module):
    """CLIP's embeddings of single icons, asked for once, with the same `TOGETHER` every time: they depend on nothing else."""

    def __init__(self, icons: IconSet, frozen: FrozenCLIP):
        super().__init__()
        self.icons, self.frozen = icons, frozen
        # no buffers: DDP would lay the first process's over all
        self.embeds, self.known = torch.zeros(len(icons), frozen.dim), torch.zeros(len(icons), dtype=torch.bool)
        self.complete = False

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings [..., D] of the icons `rows`; of none, -1, whatever they may be.

        On a CPU only those of the icons that are asked for are computed; elsewhere, where looking at `rows` would make the
        host wait, those of all icons at the first call.
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


def of_two(names: Tensor, sides: Tensor) -> Tensor:
    """Which rows [B] of a batch say where each of two things is, of `names` [B, T] and `sides` [B, P, P] as in `Grounding`."""
    return (names > 0).any(1) & (names < 0).any(1) & (sides != 0).flatten(1).any(1)


def unlike(guessed: Tensor, names: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine of what a name's tokens are guessed to look like, `guessed` [B, T, D], and what it does; and which rows count.

    `names` [B, T] and `embeds` [B, 2, D] are as `Grounding` has them. Both answers are [B, 2]: of the first name and of the
    second. What does not count is 0.
    """
    off = [1 - F.cosine_similarity(guessed.float(), embeds[:, number, None], dim=-1) for number in (0, 1)]
    pairs = [mean_over(names == sign, values) for sign, values in zip((1, -1), off, strict=True)]
    return tuple(torch.stack(part, 1) for part in zip(*pairs, strict=True))


def mean_over(tokens: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Means [B] of `values` [B, T] over the `tokens` [B, T] bool of each row, 0 where there are none; and where there are."""
    return (values * tokens).sum(1) / tokens.sum(1).clamp_min(1), tokens.any(1)


@dataclass
class Grounding:
    """How far off a decoder and its `text_proj` are, from what they answered on a batch.

    `names` [B, T] has 1 for the text tokens of a caption's first name, -1 for those of its second, 0 elsewhere. `sides`
    [B, P, P] has 1 where the first thing alone covers the image, -1 where the second does, 0 elsewhere. `embeds` [B, 2, D]
    are CLIP's embeddings of the two. `shares` of each attention layer [B, h*w] say how the decoder's pixels divide between
    the names, and `guess` [B, T, D] what `text_proj` guessed the tokens to look like, None where it does not.
    """

    names: Tensor
    sides: Tensor
    embeds: Tensor
    shares: Sequence[Tensor] = ()
    guess: Tensor | None = None

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch, to which examples that name nothing add 0, and the means of those that do (NaN of none).

        "where" is the cross-entropy of which of the two names a pixel attends to (all heads together, other tokens left out),
        over the pixels that one of the things covers alone and over the layers; "what" is 1 - cosine of a name's tokens.
        """
        loss, shown = self.embeds.new_zeros(()), {}
        if self.shares:
            where = self.where()
            loss, shown["where"] = loss + where.sum() / len(where), masked_mean(where.detach(), of_two(self.names, self.sides))
        if self.guess is not None:
            what, named = unlike(self.guess, self.names, self.embeds)
            loss, shown["what"] = loss + what.sum() / len(what), masked_mean(what.detach(), named)
        return loss, shown

    def where(self) -> Tensor:
        """ "where" of each row [B], 0 of those that do not say where two things are."""
        told = of_two(self.names, self.sides)
        found = []
        for shares in self.shares:
            sides = F.adaptive_avg_pool2d(self.sides[:, None].float(), math.isqrt(shares.shape[1])).flatten(1)  # [B, h*w]
            right = torch.where(sides > 0, shares, 1 - shares).clamp_min(1e-6)
            covered = torch.where(told, sides.abs().sum(1), 1)
            found.append(-(sides.abs() * right.log()).sum(1) / covered)
        return torch.where(told, torch.stack(found).mean(0), 0)
