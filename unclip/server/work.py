"""The endpoints' work for the model: generations, variations and edits, in batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..pipelines.settings import images_at_once

IsWanted = Callable[[], bool]  # whether a client still waits for the answer


@dataclass(frozen=True)
class GenerationWork:
    """Images of prompts; a job is (prompt, seed)."""

    pipe: Any = field(repr=False)  # UnCLIPPipeline
    size: int
    name: ClassVar[str] = "generations"

    @property
    def batch(self) -> int:
        return images_at_once(self.size)

    def run(self, jobs: list[tuple[str, int]], is_wanted: IsWanted) -> list[Image.Image]:
        prompts = [prompt for prompt, _ in jobs]
        settings: dict[str, Any] = {"generator": generators(seed for _, seed in jobs), "size": self.size}
        return self.pipe(prompts, **settings, callback_on_step_end=stop_unless(is_wanted)).images


@dataclass(frozen=True)
class VariationWork:
    """Variations of images; a job is (preprocessed image [1, 3, S, S], seed)."""

    pipe: Any = field(repr=False)  # UnCLIPImageVariationPipeline
    size: int
    name: ClassVar[str] = "variations"

    @property
    def batch(self) -> int:
        return images_at_once(self.size)

    def run(self, jobs: list[tuple[Tensor, int]], is_wanted: IsWanted) -> list[Image.Image]:
        pixels = torch.cat([pixels for pixels, _ in jobs])
        settings: dict[str, Any] = {"generator": generators(seed for _, seed in jobs), "size": self.size}
        return self.pipe(pixels, **settings, callback_on_step_end=stop_unless(is_wanted)).images


@dataclass(frozen=True, eq=False)
class EditWork:
    """Inpainting of an image's masked part; a job is a seed. Equals only itself, as a batch has one image and one mask."""

    pipe: Any = field(repr=False)  # UnCLIPInpaintPipeline
    size: int
    prompt: str = field(repr=False)
    image: Image.Image = field(repr=False)
    mask: Image.Image = field(repr=False)
    name: ClassVar[str] = "edits"

    @property
    def batch(self) -> int:
        return images_at_once(self.size)

    def run(self, jobs: list[int], is_wanted: IsWanted) -> list[Image.Image]:
        return self.pipe(
            self.prompt,
            self.image,
            self.mask,
            num_images_per_prompt=len(jobs),
            generator=generators(jobs),
            size=self.size,
            callback_on_step_end=stop_unless(is_wanted),
        ).images


def shrink(image: Image.Image, size: int, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """A square image of at most `size` pixels a side, as the inpainting pipeline would resize it itself."""
    return image.resize((size, size), how) if image.width > size else image


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One generator for each image, so that a seed gives the same image alone and in a batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stop_unless(is_wanted: IsWanted) -> Callable:
    """A step callback that interrupts the pipeline once no client waits for the answer."""

    def check(pipe: Any, i: int, t: Any, tensors: dict) -> dict:
        pipe._interrupt = not is_wanted()
        return {}

    return check
