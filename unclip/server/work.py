"""The endpoints' work: images of sentences, of images, and of parts of images, as many at once as fit together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ..pipelines import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline
from ..pipelines.settings import images_at_once

Wanted = Callable[[], bool]


@dataclass(frozen=True)
class GenerationWork:
    """Images of sentences; a job is (prompt, seed)."""

    pipe: UnCLIPPipeline = field(repr=False)
    size: int
    name = "generations"

    @property
    def batch(self) -> int:
        return images_at_once(self.size)

    def draw(self, jobs: list[tuple[str, int]], wanted: Wanted) -> list[Image.Image]:
        prompts = [prompt for prompt, _ in jobs]
        settings = {"generator": generators(seed for _, seed in jobs), "size": self.size}
        return self.pipe(prompts, **settings, callback_on_step_end=stop_unless(wanted)).images


@dataclass(frozen=True)
class VariationWork:
    """Variations of images; a job is (image as the image tower takes it [1, 3, S, S], seed)."""

    pipe: UnCLIPImageVariationPipeline = field(repr=False)
    size: int
    name = "variations"

    @property
    def batch(self) -> int:
        return images_at_once(self.size)

    def draw(self, jobs: list[tuple[Tensor, int]], wanted: Wanted) -> list[Image.Image]:
        pixels = torch.cat([pixels for pixels, _ in jobs])
        settings = {"generator": generators(seed for _, seed in jobs), "size": self.size}
        return self.pipe(pixels, **settings, callback_on_step_end=stop_unless(wanted)).images


@dataclass(frozen=True, eq=False)
class EditWork:
    """One image's masked part, drawn anew; a job is a seed. Equals only itself: a batch has one image and one mask."""

    pipe: UnCLIPInpaintPipeline = field(repr=False)
    size: int
    prompt: str = field(repr=False)
    image: Image.Image = field(repr=False)
    mask: Image.Image = field(repr=False)
    name = "edits"

    @property
    def batch(self) -> int:
        return images_at_once(self.size)

    def draw(self, jobs: list[int], wanted: Wanted) -> list[Image.Image]:
        return self.pipe(
            self.prompt,
            self.image,
            self.mask,
            num_images_per_prompt=len(jobs),
            generator=generators(jobs),
            size=self.size,
            callback_on_step_end=stop_unless(wanted),
        ).images


def reduced(image: Image.Image, size: int, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """A square image no larger than what is drawn: the inpainting pipeline reduces it so itself, and then finds it done."""
    return image.resize((size, size), how) if image.width > size else image


def generators(seeds) -> list[torch.Generator]:
    """One stream for each image: a seed draws the same image alone and in company."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stop_unless(wanted: Wanted) -> Callable:
    """A step's callback that ends the call once nobody waits for it."""

    def look(pipe, i, t, tensors: dict) -> dict:
        pipe._interrupt = not wanted()
        return {}

    return look
