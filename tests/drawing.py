"""Pipelines of toy width to draw with: ours and Karlo's layout, text to image and image variation."""

from pathlib import Path

import karlo
import torch
from conftest import TINY_DEFAULTS, seeds, tiny_networks
from PIL import Image

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.pipelines.base import UnCLIPBase

KINDS = [
    ("ours", UnCLIPPipeline),
    ("ours", UnCLIPImageVariationPipeline),
    ("karlo", UnCLIPPipeline),
    ("karlo", UnCLIPImageVariationPipeline),
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
    """Pictures [B, 3, H, W] of the smallest size, or what `kwargs` say."""
    subject = subjects(pipe, count) if subject is None else subject
    generator = seeds(*(numbers or range(len(subject) * kwargs.get("num_images_per_prompt", 1))))
    settings = {"size": pipe.sizes[1], "output_type": "pt", **STEPS}
    return pipe(subject, generator=generator, **(settings | kwargs)).images


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
