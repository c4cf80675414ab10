"""Similarity of samples to the icons of their names: PSNR after alignment of size and place."""

# N names

import torch
import torch.nn.functional as F
from torch import Tensor

from ...io.pixels import uint8_to_float
from ..alignment import Match, nearest_icon
from ..context import EvaluationContext
from ..metrics import Estimate, mean, psnr
from ..report import Part, Sheet, Table

SHOWN = 24


def measure(context: EvaluationContext) -> Part:
    """PSNR of samples from true embeddings and from the prior's, beside that of real renders.

    To the nearest of a name's styles if the prompt names none, else to the icon of that style.
    """
    singles = context.single_concepts
    own = [[row] for row in singles.rows]
    matches = {
        "true embedding": singles.nearest_to_true,
        "prior": singles.nearest_to_prior,
        "true embedding, its own icon": nearest_icon(singles.from_true, context.icons, own),
        "prior, style named": nearest_icon(singles.from_prior_styled, context.icons, own),
    }
    sampled, real = {name: mean(match.psnr) for name, match in matches.items()}, _real(context)
    rows = [["sampled", *item] for item in sampled.items()] + [["real", *item] for item in real.items()]
    note = (
        f"{len(own)} names that were trained on, at 64 px: PSNR to the most similar real render of the name, of any style "
        "unless one is named, at 0.9 to 1.1 times its size and shifted by up to 4 px."
    )
    sheets = [
        _pairs("From true embeddings, each beside the most similar icon", singles.from_true, singles.nearest_to_true, context),
        _pairs("After the prior, likewise", singles.from_prior, singles.nearest_to_prior, context),
    ]
    return Part("likeness", sampled | {"real": real}, [Table("Likeness", ["", "", "PSNR, dB"], rows, note), *sheets])


def _real(context: EvaluationContext) -> dict[str, Estimate]:
    """PSNR of real renders at another size and place, at half the resolution, and of another style."""
    singles = context.single_concepts
    exact = uint8_to_float(singles.real)
    small = F.interpolate(F.avg_pool2d(exact, 2), exact.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
    moved = mean(singles.nearest_to_jittered.psnr)
    found = {"another size and place": moved, "half the resolution, enlarged again": mean(psnr(small, exact))}
    others = [[r for r in rows if r != row] for row, rows in zip(singles.rows, singles.of_name, strict=True)]
    several = [n for n, rows in enumerate(others) if rows]
    if several:
        match = nearest_icon(singles.real[several], context.icons, [others[n] for n in several])
        found["another style (floor)"] = mean(match.psnr)
    return found


def _pairs(title: str, images: Tensor, match: Match, context: EvaluationContext) -> Sheet:
    shown = torch.stack([images[:SHOWN], match.renders[:SHOWN]], 1).flatten(0, 1)
    texts = [prompt.text for prompt in context.single_concepts.prompts[:SHOWN]]
    labels = [t for text, dB in zip(texts, match.psnr.tolist(), strict=False) for t in (text, f"nearest, {dB:.1f} dB")]
    return Sheet(title, shown, labels)
