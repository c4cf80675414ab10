"""Objects that repeat an icon of training almost to the pixel."""

# N images, R icons, S pixels of a side

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.judged import icon_rows
from ...data.plans import split_of_icon
from ...data.render import Layer, compose_sprites
from .. import prompts as prompt_sets
from ..alignment import SHIFT, shifted_errors
from ..context import EvaluationContext
from ..metrics import mean
from ..pair_detector import GROUND, centred, ground_colour
from ..poses import jittered
from ..report import Part, Sheet, Table

MIN_PSNR = 30.0  # dB over an object's box from which on it is a copy; real renders of the same icon reach 39 and more
SCENES = 128
CANDIDATES = 4  # icons that an object is compared with: nearest in the judge's embeddings
SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)
REFINEMENT = (0.5, 0.5, 0.25, 0.125)  # steps in pixels by which the best place, and doubled the best size, is refined
MARGIN = 2  # pixels around an object's box
MIN_SIDE = 12  # pixels of an object's longer side
SHOWN = 12


class Box(NamedTuple):
    """The bounding box of an object in pixels; `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int


class Copy(NamedTuple):
    """The training icon most similar to an object of an image: PSNR in dB over the object's box, row, and render."""

    psnr: float
    row: int
    render: Tensor


def measure(context: EvaluationContext) -> Part:
    """The share of sampled names and scenes with an object that is a copy of a training icon, at any size and place.

    Beside real renders: of training icons, which tests the search, and of icons that were never trained on.
    """
    singles = context.single_concepts
    names, scenes = (
        [p.text for p in singles.prompts],
        prompt_sets.scenes(context.icons, context.split, context.limited_count(SCENES)),
    )
    unseen = context.limited([row for row in icon_rows(context.icons, seed=5) if not _is_trained(context, row)], SCENES)
    sets = {
        "names": (singles.from_prior, names),
        "scenes": (context.sample("scenes", scenes), [p.text for p in scenes]),
        "real: trained on": (singles.jittered, names),
    }
    if unseen:
        concepts = [context.icons.icons[row]["concept"] for row in unseen]
        sets["real: never trained on"] = (jittered(context.icons, unseen, context.sample_store.seed), concepts)
    results: dict[str, Any] = {"threshold": MIN_PSNR}
    rows, sheets = [], []
    for name, (images, texts) in sets.items():
        found = nearest_objects(context, images)
        psnr = torch.tensor([copy.psnr for copy in found])
        near = psnr >= MIN_PSNR
        results[name] = {"count": int(near.sum()), "rate": mean(near.float()), "psnr": mean(psnr)}
        rows.append([name, *results[name].values()])
        if images is not singles.jittered:
            results[name]["prompts"] = [texts[n] for n in near.nonzero()[:, 0].tolist()]
            sheets.append(_sheet(context, name, images, texts, found))
    note = (
        f"An object repeats an icon where the PSNR over its box is at least {MIN_PSNR:g} dB at the best size and place. "
        f"Compared are the {CANDIDATES} icons of training that are nearest in the judge's embeddings."
    )
    table = Table("Near-duplicates of training icons", ["", "count", "rate", "PSNR to the nearest, dB"], rows, note)
    return Part("copies", results, [table, *sheets])


def _sheet(context: EvaluationContext, name: str, images: Tensor, texts: list[str], found: list[Copy]) -> Sheet:
    """The images nearest to a training icon, each beside it."""
    closest = sorted(range(len(found)), key=lambda n: -found[n].psnr)[:SHOWN]
    shown, labels = [], []
    for n in closest:
        icon = context.icons.icons[found[n].row]
        shown += [images[n], found[n].render]
        labels += [texts[n], f"{icon['concept']}, {icon['style']}: {found[n].psnr:.1f} dB"]
    return Sheet(f"Nearest to icons of training: {name}", torch.stack(shown), labels)


def nearest_objects(context: EvaluationContext, images: Tensor) -> list[Copy]:
    """For each image uint8 [N, 3, S, S] the object most similar to a training icon; a PSNR of 0 without an object."""
    rows = torch.tensor(context.pair_detector.rows)
    trained = torch.tensor([_is_trained(context, row) for row in context.pair_detector.rows])
    boxes = [(n, *found) for n, image in enumerate(images) for found in object_crops(image)]
    best = [Copy(0.0, int(rows[trained][0]), torch.full_like(image, 255)) for image in images]
    if not boxes:
        return best
    embeds = context.judge.see(torch.stack([window for _, _, window in boxes]))[0]
    likely = (embeds @ context.pair_detector.known[trained].T).topk(min(CANDIDATES, int(trained.sum()))).indices
    for (n, box, _), some in zip(boxes, rows[trained][likely].tolist(), strict=True):
        found = _most_similar(context, images[n], box, some)
        best[n] = max(best[n], found, key=lambda copy: copy.psnr)
    return best


def object_crops(image: Tensor) -> list[tuple[Box, Tensor]]:
    """The objects of an image uint8 [3, S, S] and of its halves: each box, and its content enlarged to S pixels."""
    side, ground = image.shape[-1], ground_colour(image)
    held = ((image.float() - ground).abs() > GROUND * 255).any(0)
    half, every = side // 2, slice(0, side)
    first, second = slice(0, half), slice(half, side)
    found: dict[Box, Tensor] = {}
    for down, across in ((every, every), (every, first), (every, second), (first, every), (second, every)):
        rows, columns = (held[down, across].any(dim).nonzero()[:, 0] for dim in (1, 0))
        if not len(rows):
            continue
        top, left = down.start + int(rows[0]), across.start + int(columns[0])
        box = Box(top, left, down.start + int(rows[-1]) + 1, across.start + int(columns[-1]) + 1)
        if max(box.bottom - box.top, box.right - box.left) >= MIN_SIDE:
            found.setdefault(box, centred(image[:, down, across], ground))
    return list(found.items())


def _most_similar(context: EvaluationContext, image: Tensor, box: Box, rows: list[int]) -> Copy:
    """The icon of `rows` most similar to the content of the image's box: first to the pixel, then refined."""
    ground, side = ground_colour(image)[:, 0, 0] / 255, image.shape[-1]
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)
    inside[max(box.top - MARGIN, 0) : box.bottom + MARGIN, max(box.left - MARGIN, 0) : box.right + MARGIN] = True
    layers = [Layer(row, *_place_in_box(context, row, box, scale, side)) for row in rows for scale in SCALES]
    errors = shifted_errors(image, _render(context, layers, ground, side), ground, inside)
    n, down, across = (int(i) for i in torch.unravel_index(errors.argmin(), errors.shape))
    best = replace(layers[n], x=layers[n].x + (across - SHIFT) / side, y=layers[n].y + (down - SHIFT) / side)
    for step in REFINEMENT:
        offsets = [tuple(by * step / side for by in three) for three in product((0, -1, 1), repeat=3)]
        near = [Layer(best.icon, best.x + x, best.y + y, best.size + 2 * larger) for x, y, larger in offsets]
        found = _render(context, near, ground, side)
        errors = (found.float() - image.float()).div(255).square()[:, :, inside].mean((1, 2))
        best, render = near[int(errors.argmin())], found[int(errors.argmin())]
    return Copy(-10 * errors.min().clamp_min(1e-10).log10().item(), best.icon, render)


def _render(context: EvaluationContext, layers: list[Layer], ground: Tensor, side: int) -> Tensor:
    """Each layer alone on the background [3]: uint8 [N, 3, side, side]."""
    red, green, blue = (int(v) for v in (ground * 255).round())
    images = np.stack([compose_sprites([layer], context.icons.sprites, side, (red, green, blue)) for layer in layers])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _place_in_box(context: EvaluationContext, row: int, box: Box, scale: float, side: int) -> tuple[float, float, float]:
    """x, y and size at which an icon's drawing fills a box, times `scale`."""
    shown = np.asarray(context.icons.sprites[row])[..., 3] > 32
    down, across = (np.flatnonzero(shown.any(axis)) / len(shown) for axis in (1, 0))
    extents = [(v[0], v[-1] + 1 / len(shown)) if len(v) else (0.0, 1.0) for v in (across, down)]
    size = max(box.bottom - box.top, box.right - box.left) / max(high - low for low, high in extents) * scale
    centres = ((box.left + box.right) / 2, (box.top + box.bottom) / 2)
    x, y = (at - ((low + high) / 2 - 0.5) * size for at, (low, high) in zip(centres, extents, strict=True))
    return x / side, y / side, size / side


def _is_trained(context: EvaluationContext, row: int) -> bool:
    """Whether this icon is in the training data of a decoder trained on all concepts."""
    icon = context.icons.icons[row]
    return split_of_icon(icon["concept"], icon["style"], all_concepts=True) == "train"
