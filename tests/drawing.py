"""Pipelines of toy width to draw with, over our networks and over Karlo's layout."""

import io
from pathlib import Path

import karlo
import torch
from conftest import TINY_DEFAULTS, seeds, tiny_networks
from PIL import Image

from unclip import (
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPInterpolationPipeline,
    UnCLIPPCAPipeline,
    UnCLIPPipeline,
    UnCLIPPriorPipeline,
    UnCLIPTextDiffPipeline,
)
from unclip.diffusion.latents import PrincipalAxes
from unclip.pipelines.base import UnCLIPBase

KINDS = [
    ("ours", UnCLIPPipeline),
    ("ours", UnCLIPImageVariationPipeline),
    ("karlo", UnCLIPPipeline),
    ("karlo", UnCLIPImageVariationPipeline),
]
OTHERS = [
    ("ours", UnCLIPPriorPipeline),
    ("ours", UnCLIPInterpolationPipeline),
    ("ours", UnCLIPTextDiffPipeline),
    ("ours", UnCLIPInpaintPipeline),
    ("ours", UnCLIPPCAPipeline),
    ("karlo", UnCLIPTextDiffPipeline),
    ("karlo", UnCLIPInpaintPipeline),
]
STEPS = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}


def make(networks: str, kind: type[UnCLIPBase], folder: Path) -> UnCLIPBase:
    have = tiny_networks() if networks == "ours" else karlo.parts(folder)
    pipe = kind(**{n: have.get(n) for n in kind.component_names()}, defaults=TINY_DEFAULTS if networks == "ours" else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)


def subjects(pipe: UnCLIPBase, count: int) -> list:
    if isinstance(pipe, UnCLIPPipeline):
        return ["a star", "two red rings", "a moon", "a"][:count]
    return [Image.new("RGB", (80, 64 + n), (40 * n, 200 - 30 * n, 90)) for n in range(count)]


def draw(pipe: UnCLIPBase, count: int = 1, numbers: list[int] | None = None, subject=None, **kwargs) -> torch.Tensor:
    """Images [B, 3, H, W] of the smallest size, or what `kwargs` say."""
    subject = subjects(pipe, count) if subject is None else subject
    generator = seeds(*(numbers or range(len(subject) * kwargs.get("num_images_per_prompt", 1))))
    settings = {"size": pipe.sizes[1], "output_type": "pt", **STEPS}
    return pipe(subject, generator=generator, **(settings | kwargs)).images


def answer(pipe: UnCLIPBase, seed: int = 0, **kwargs):
    """What any of the pipelines answers to its simplest call."""
    image = Image.new("RGB", (64, 64), (200, 90, 40))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 24))
    arguments, settings = {
        UnCLIPPipeline: (("a star",), STEPS),
        UnCLIPImageVariationPipeline: ((image,), STEPS),
        UnCLIPPriorPipeline: (("a star",), {}),
        UnCLIPInterpolationPipeline: ((["a star", image],), STEPS | {"steps": 2}),
        UnCLIPTextDiffPipeline: ((image, "a star"), STEPS),
        UnCLIPPCAPipeline: ((image, PrincipalAxes.of(torch.eye(32)), (0, 5, 31)), STEPS),
        UnCLIPInpaintPipeline: (("a star", image, mask), STEPS | {"resample": 1}),
    }[type(pipe)]
    if pipe.sizes:
        settings = settings | {"size": pipe.sizes[1], "output_type": "pt"}
    return pipe(*arguments, generator=seeds(seed)[0], **(settings | kwargs))


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def png(size=(64, 64), colour="red", hole=None, **kwargs) -> bytes:
    """An image file, PNG unless `format` says otherwise; the box `hole` of it is transparent."""
    image = Image.new("RGBA", size, colour)
    if hole is not None:
        image.paste((0, 0, 0, 0), hole)
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | kwargs))
    return file.getvalue()
