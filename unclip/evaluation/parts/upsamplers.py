"""The upsamplers compared with bicubic interpolation."""

# N images

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from upsamplers.model import resize

from ...data.judged import icon_rows
from ...data.render import flatten, render_svg
from ...data.scenes import split_of_concept
from ...io.pixels import float_to_uint8, uint8_to_float
from .. import prompts as prompt_sets
from ..context import EvaluationContext, UnsupportedPart
from ..metrics import mean, psnr, ratio, sharpness, ssim
from ..report import Part, Sheet, Table

ENLARGED = 32


def measure(context: EvaluationContext) -> Part:
    """Held-out icons upsampled fourfold from real low-resolution renders, beside bicubic; then samples."""
    sizes = context.pipe.sizes
    if len(sizes) < 2:
        raise UnsupportedPart("this model has no upsampler")
    icons, split = context.icons, prompt_sets.SPLITS[context.split]
    rows = [r for r in icon_rows(icons, seed=2) if split_of_concept(icons.icons[r]["concept"]) == split]
    rows = context.limited(rows, ENLARGED)
    texts = [icons.icons[r]["concept"] for r in rows]
    truth = {sizes[-1]: uint8_to_float(torch.stack([_render(icons.icons[r]["svg"], sizes[-1]) for r in rows]))}
    for size in reversed(sizes[:-1]):
        truth[size] = F.avg_pool2d(truth[sizes[-1]], sizes[-1] // size)
    drawn = uint8_to_float(
        context.sample("recognition", context.limited(prompt_sets.recognition(icons, context.split), ENLARGED))
    )
    results, lines, generated, shown = {}, [], [], []
    for low, high in zip(sizes, sizes[1:], strict=False):
        name = f"{low} to {high}"
        ours = context.upsample(f"upsampled-{low}-{high}", texts, truth[low], high)
        plain = resize(truth[low], high).clamp(0, 1)
        ours_psnr, plain_psnr = _each(psnr, ours, truth[high]), _each(psnr, plain, truth[high])
        true_sharpness = _each(sharpness, truth[high])
        found = {
            "psnr": mean(ours_psnr),
            "psnr_bicubic": mean(plain_psnr),
            "gain": mean(ours_psnr - plain_psnr),
            "ssim": mean(_each(ssim, ours, truth[high])),
            "ssim_bicubic": mean(_each(ssim, plain, truth[high])),
            "sharpness": ratio(_each(sharpness, ours), true_sharpness),
            "sharpness_bicubic": ratio(_each(sharpness, plain), true_sharpness),
        }
        results[name] = found
        lines.append([name, *found.values()])
        shown.append(_strip(f"{name}: true, bicubic, enlarged", truth[high], plain, ours, texts))
        from_drawn = context.upsample(f"upsampled-drawn-{low}-{high}", [f"drawn {n}" for n in range(len(drawn))], drawn, high)
        enlarged = resize(drawn, high).clamp(0, 1)
        found = {
            "consistency": mean(_each(psnr, F.avg_pool2d(from_drawn, high // low), drawn)),
            "sharpness": mean(_each(sharpness, from_drawn) / true_sharpness.mean()),
            "sharpness_bicubic": mean(_each(sharpness, enlarged) / true_sharpness.mean()),
        }
        results[f"{name}, drawn"] = found
        generated.append([name, *found.values()])
        drawn = from_drawn
    note = f"{len(rows)} icons of held-out concepts. Sharpness: of the steepest twentieth of the pixels, over the true one."
    columns = ["px", "PSNR", "PSNR bicubic", "gain", "SSIM", "SSIM bicubic", "sharpness", "sharpness bicubic"]
    first = Table("From true low-resolution renders", columns, lines, note)
    columns = ["px", "PSNR made small again", "sharpness", "sharpness bicubic"]
    second = Table(
        "From drawn ones", columns, generated, "Made small again, against what was enlarged. Sharpness beside real renders'."
    )
    return Part("upsamplers", results, [first, second, *shown])


def _each(metric: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """A metric [N] of images [N, 3, H, W], a few at a time: at 1024 px its intermediate steps are large."""
    return torch.cat([metric(*chunk) for chunk in zip(*(p.split(4) for p in images), strict=True)])


def _render(svg: str, size: int) -> Tensor:
    return torch.from_numpy(flatten(render_svg(svg, size))).permute(2, 0, 1)


def _strip(title: str, true: Tensor, plain: Tensor, ours: Tensor, texts: list[str], count: int = 4) -> Sheet:
    """Centre crops of the first few images: true, bicubic and upsampled."""
    side, size = 192, true.shape[-1]
    left = (size - side) // 2
    rows = torch.stack([true[:count], plain[:count], ours[:count]], 1).flatten(0, 1)
    crops = float_to_uint8(rows[..., left : left + side, left : left + side])
    labels = [f"{t}, {how}" for t in texts[:count] for how in ("true", "bicubic", "enlarged")]
    return Sheet(title, crops, labels, side=192)
