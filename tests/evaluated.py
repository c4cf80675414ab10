"""What tests of the evaluation's parts share: images put in the place of sampled ones, and a judge that sees shapes."""

import json
from pathlib import Path

import torch
from PIL import Image


class Comparing:
    """Sees shapes as they are, apart from the ground."""

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.interpolate(images.float() / 255, (16, 16), mode="area")
        found = torch.nn.functional.normalize((small - small[:, :, :1, :1]).flatten(1), dim=-1)
        return found, found


def results(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def put(images: torch.Tensor, folder: Path, numbers: list[int] | None = None) -> None:
    """Images uint8 [N, 3, S, S] in the place of those that a model sampled."""
    for n, image in zip(numbers or range(len(images)), images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{n:05d}.png")
