"""Distances between sets of sampled and real scenes, and copies of training icons."""

# N images, M training renders

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.scenes import IconSet, split_of_icon
from ...io.pixels import uint8_to_float
from .. import prompts as prompt_sets
from ..context import SCENES, EvaluationContext
from ..metrics import frechet, jackknife, kernel_distance, mean, precision_recall
from ..report import Part, Sheet, Table

COPY = 0.06  # RMS difference at 16x16 px, of the range [0, 1], below which an image counts as a copy of a training render


def measure(context: EvaluationContext) -> Part:
    """Distances between sampled and real scenes, beside those between two sets of real scenes; and copies."""
    count = context.limited_count(SCENES)
    prompts = prompt_sets.scenes(context.icons, context.split, count)
    others = context.real_renders(prompt_sets.scenes(context.icons, context.split, count, first=count))
    drawn, real = context.sample("scenes", prompts), context.real_renders(prompts)
    features = {name: context.judge.see(p)[1] for name, p in (("drawn", drawn), ("real", real), ("others", others))}
    results: dict[str, Any] = {"pictures_on_each_side": count}
    rows = []
    for name, statistic in (("Fréchet distance", frechet), ("kernel distance", kernel_distance)):
        found = [jackknife(statistic, features[side], features["others"]) for side in ("drawn", "real")]
        key = name.replace("é", "e").replace(" ", "_").lower()
        results[key], results[f"{key}_floor"] = found
        rows.append([name, *found])
    shares = []
    for side in ("drawn", "real"):
        precision, recall = precision_recall(features[side], features["others"])
        shares.append((mean(precision.float()), mean(recall.float())))
    for place, name in enumerate(("precision", "recall")):
        results[name], results[f"{name}_floor"] = shares[0][place], shares[1][place]
        rows.append([name, shares[0][place], shares[1][place]])
    training = training_renders(context.icons)
    copies, nearest = {}, {}
    for side, images in (("drawn", drawn), ("real", real)):
        nearest[side], match = nearest_render(images, training)
        copies[side] = mean((nearest[side] < COPY).float())
        if side == "drawn":
            closest = nearest[side].argsort()[:8]
            pairs = torch.stack([drawn[closest], _on_white(context.icons, match[closest])], 1).flatten(0, 1)
    results["copies"], results["copies_floor"] = copies["drawn"], copies["real"]
    rows.append([f"within {COPY} RMS of a training render", copies["drawn"], copies["real"]])
    note = (
        f"{count} images on each side, of scenes with held-out concepts or combinations; the floor is the same between "
        "two disjoint halves of real renders. In the judge's features."
    )
    labels = [t for n in closest.tolist() for t in (prompts[n].text, f"nearest, at {nearest['drawn'][n]:.3f}")]
    table = Table("Drawn scenes against real ones", ["", "drawn", "real renders (floor)"], rows, note)
    sheets = [
        Sheet("The first 24 scenes", drawn[:24], [p.text for p in prompts[:24]]),
        Sheet("Nearest to training", pairs, labels),
    ]
    return Part("fidelity", results, [table, *sheets])


def training_renders(icons: IconSet) -> tuple[Tensor, Tensor]:
    """All training icons on white at three sizes as 16x16 px [M, 768], and their rows [M]."""
    rows = [n for n, i in enumerate(icons.icons) if split_of_icon(i["concept"], i["style"], all_concepts=True) == "train"]
    kept = []
    for start in range(0, len(rows), 512):
        white = uint8_to_float(_on_white(icons, torch.tensor(rows[start : start + 512])))
        for side in (55, 58, 61):
            small = F.interpolate(white, (side, side), mode="area")
            left = (64 - side) // 2
            padded = F.pad(small, (left, 64 - side - left, left, 64 - side - left), value=1.0)
            kept.append((F.avg_pool2d(padded, 4).flatten(1), torch.tensor(rows[start : start + 512])))
    return torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept])


def nearest_render(images: Tensor, training: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Root mean square difference [N] of images uint8 [N, 3, 64, 64] to their nearest training render, and its row [N]."""
    small = F.avg_pool2d(uint8_to_float(images), images.shape[-1] // 16).flatten(1)
    found = [torch.cdist(chunk, training[0]).min(1) for chunk in small.split(256)]
    distance = torch.cat([f.values for f in found]) / small.shape[1] ** 0.5
    return distance, training[1][torch.cat([f.indices for f in found])]


def _on_white(icons: IconSet, rows: Tensor) -> Tensor:
    sprites = torch.from_numpy(np.asarray(icons.sprites[rows.numpy()])).permute(0, 3, 1, 2).float()
    alpha = sprites[:, 3:] / 255
    return (sprites[:, :3] * alpha + 255 * (1 - alpha)).round().byte()
