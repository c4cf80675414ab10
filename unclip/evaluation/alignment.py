"""The most similar real render of an image, over icons, sizes and shifts."""

# N images, K candidates, S pixels of a side, W shifts along each axis

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.icons import IconSet
from ..io.pixels import float_to_uint8, uint8_to_float
from .poses import in_pose

SCALES = tuple(1 + n / 50 for n in range(-5, 6))  # 0.9 to 1.1 of the icon's size in its pose
SHIFT = 4  # pixels, in each direction


@dataclass
class Match:
    """The most similar real render of each of N images.

    Attributes:
        psnr: In dB, [N].
        rows: Rows of the icons, [N].
        renders: uint8 [N, 3, 64, 64].
    """

    psnr: Tensor
    rows: Tensor
    renders: Tensor


def nearest_icon(images: Tensor, icons: IconSet, rows: Sequence[Sequence[int]]) -> Match:
    """The best of each image's candidate icons at all `SCALES`, shifted by up to `SHIFT` pixels.

    Args:
        images: uint8 [N, 3, 64, 64], of a single object on white.
        rows: for each image the rows of its candidate icons.
    """
    wanted = sorted({row for some in rows for row in some})
    at = {row: n for n, row in enumerate(wanted)}
    renders = torch.stack([in_pose(icons, wanted, scale) for scale in SCALES], 1)  # [rows, scales, 3, 64, 64]
    psnrs, chosen, found = [], [], []
    for image, some in zip(images, rows, strict=True):
        candidates = renders[[at[row] for row in some]].flatten(0, 1)
        errors = shifted_errors(image, candidates)  # [K, W, W]
        candidate, down, across = (int(n) for n in torch.unravel_index(errors.argmin(), errors.shape))
        render = shift(candidates[candidate], down - SHIFT, across - SHIFT)
        error = (image.float() - render.float()).div(255).square().mean()
        psnrs.append(-10 * error.clamp_min(1e-10).log10())
        chosen.append(some[candidate // len(SCALES)])
        found.append(render)
    return Match(torch.stack(psnrs), torch.tensor(chosen), torch.stack(found))


def shifted_errors(image: Tensor, candidates: Tensor, ground: Tensor | None = None, inside: Tensor | None = None) -> Tensor:
    """Mean squared errors of candidates shifted by -`SHIFT` to `SHIFT` rows and columns against an image.

    Computed by FFT: sum m (a - b)^2 = sum m a^2 + sum m b^2 - 2 sum m a b, the last two correlations. Exact to 1e-6.

    Args:
        image: uint8 [3, S, S].
        candidates: uint8 [K, 3, S, S].
        ground: the background colour [3] in [0, 1], which fills what a shift uncovers; default: white.
        inside: bool [S, S], the pixels m that are compared; default: all.

    Returns:
        float32 [K, W, W] in [0, 1], W = 2 * `SHIFT` + 1.
    """
    ground = torch.ones(3) if ground is None else ground
    a, b = (uint8_to_float(x) - ground[:, None, None] for x in (image, candidates))
    mask = torch.ones(a.shape[1:]) if inside is None else inside.float()
    a = a * mask
    side = a.shape[-1] + 2 * SHIFT
    ours = torch.fft.rfft2(torch.cat([-2 * a, mask[None]]), s=(side, side))
    theirs = torch.fft.rfft2(torch.cat([b, b.square().sum(1, keepdim=True)], 1), s=(side, side)).conj()
    sums = torch.fft.irfft2((ours * theirs).sum(1), s=(side, side))  # at d: sum over x of m b(x - d)^2 - 2 m a b(x - d)
    places = torch.arange(-SHIFT, SHIFT + 1) % side
    errors = a.square().sum() + sums[:, places][:, :, places]
    return errors.clamp_min(0) / (3 * mask.sum())


def shift(render: Tensor, down: int, across: int, ground: Tensor | None = None) -> Tensor:
    """An image uint8 [3, S, S] moved by whole pixels; the background [3] in [0, 1], default white, fills the rest."""
    ground = torch.ones(3) if ground is None else ground
    moved = float_to_uint8(ground)[:, None, None].expand_as(render).clone()
    rows, columns = (slice(max(by, 0), render.shape[-1] + min(by, 0)) for by in (down, across))
    before, left = (slice(max(-by, 0), render.shape[-1] + min(-by, 0)) for by in (down, across))
    moved[:, rows, columns] = render[:, before, left]
    return moved
