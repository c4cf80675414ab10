"""The endpoints' work: pictures of sentences, of pictures, and of parts of pictures, as many at once as fit together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ..pipelines import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline
from ..pipelines.base import pictures_at_once

Wanted = Callable[[], bool]


@dataclass(frozen=True)
class GenerationWork:
    """Pictures of sentences; a job is (prompt, seed)."""

    pipe: UnCLIPPipeline = field(repr=False)
    size: int
    name = "generations"

    @property
    def batch(self) -> int:
        return pictures_at_once(self.size)

    def draw(self, jobs: list[tuple[str, int]], wanted: Wanted) -> list[Image.Image]:
        prompts = [prompt for prompt, _ in jobs]
        settings = {"generator": generators(seed for _, seed in jobs), "size": self.size}
        return self.pipe(prompts, **settings, callback_on_step_end=stop_unless(wanted)).images


@dataclass(frozen=True)
class VariationWork:
    """Variations of pictures; a job is (picture as the image tower takes it [1, 3, S, S], seed)."""

    pipe: UnCLIPImageVariationPipeline = field(repr=False)
    size: int
    name = "variations"

    @property
    def batch(self) -> int:
        return pictures_at_once(self.size)

    def draw(self, jobs: list[tuple[Tensor, int]], wanted: Wanted) -> list[Image.Image]:
        pixels = torch.cat([pixels for pixels, _ in jobs])
        settings = {"generator": generators(seed for _, seed in jobs), "size": self.size}
        return self.pipe(pixels, **settings, callback_on_step_end=stop_unless(wanted)).images


@dataclass(frozen=True, eq=False)
class EditWork:
    """One picture's masked part, drawn anew; a job is a seed. Equals only itself: a batch has one picture and one mask."""

    pipe: UnCLIPInpaintPipeline = field(repr=False)
    size: int
    prompt: str = field(repr=False)
    picture: Image.Image = field(repr=False)
    mask: Image.Image = field(repr=False)
    name = "edits"

    @property
    def batch(self) -> int:
        return pictures_at_once(self.size)

    def draw(self, jobs: list[int], wanted: Wanted) -> list[Image.Image]:
        return self.pipe(
            self.prompt,
            self.picture,
            self.mask,
            num_images_per_prompt=len(jobs),
            generator=generators(jobs),
            size=self.size,
            callback_on_step_end=stop_unless(wanted),
        ).images


def reduced(picture: Image.Image, size: int, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """A square picture no larger than what is drawn: the inpainting pipeline reduces it so itself, and then finds it done."""
    return picture.resize((size, size), how) if picture.width > size else picture


def generators(seeds) -> list[torch.Generator]:
    """One stream for each picture: a seed draws the same picture alone and in company."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stop_unless(wanted: Wanted) -> Callable:
    """A step's callback that ends the call once nobody waits for it."""

    def look(pipe, i, t, tensors: dict) -> dict:
        pipe._interrupt = not wanted()
        return {}

    return look
