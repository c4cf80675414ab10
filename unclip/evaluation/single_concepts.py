"""Single concepts, which several parts measure: their prompts, icons and samples."""

# N names, D embedding dimension, S pixels of a side

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.captions import style_phrase
from ..data.icons import IconSet
from ..data.plans import split_of_icon
from ..io.pixels import float_to_uint8, uint8_to_float
from . import prompts as prompt_sets
from .alignment import Match, nearest_icon
from .poses import in_pose, jittered
from .prompts import Prompt

if TYPE_CHECKING:
    from .context import EvaluationContext

NAMES = 256


class SingleConcepts:
    """The first concepts of a split that the model was trained on, each with one of the icons it was trained on.

    Images are uint8 [N, 3, S, S]; real renders are at 64 px, in the pose of training. `from_prior` are the images of the part
    `recognition`.
    """

    def __init__(self, context: "EvaluationContext"):
        self.context, self.icons = context, context.icons
        prompts = prompt_sets.recognition(context.icons, context.split)
        self.numbers = context.limited([n for n, prompt in enumerate(prompts) if prompt.known], NAMES)
        self._sampled_prompts = prompts[: self.numbers[-1] + 1]
        self.prompts = [prompts[n] for n in self.numbers]
        self.rows = [trained_icon(context.icons, prompt) for prompt in self.prompts]
        self.styles = [context.icons.icons[row]["style"] for row in self.rows]
        self.of_name = [styles_of(context.icons, prompt.text) for prompt in self.prompts]

    @cached_property
    def styled(self) -> list[Prompt]:
        """The same names with the style of their icon."""
        return [
            Prompt(f"{prompt.text} in {style_phrase(style)}", prompt.truth, prompt.right)
            for prompt, style in zip(self.prompts, self.styles, strict=True)
        ]

    @cached_property
    def real(self) -> Tensor:
        """Real renders of `rows`."""
        return in_pose(self.icons, self.rows)

    @cached_property
    def jittered(self) -> Tensor:
        """Real renders of `rows` at other sizes and places."""
        return jittered(self.icons, self.rows, self.context.sample_store.seed)

    @cached_property
    def true_embeddings(self) -> Tensor:
        """The embeddings of `real` by the model's own CLIP: [N, D]."""
        return torch.cat([self.context.clip.encode_image(uint8_to_float(chunk)) for chunk in self.real.split(64)])

    @cached_property
    def from_prior(self) -> Tensor:
        """Samples for the names, from the prior's image embeddings."""
        return self.context.sample("recognition", self._sampled_prompts)[self.numbers]

    @cached_property
    def from_true(self) -> Tensor:
        """Samples for the names with their style, from `true_embeddings`, which are of that style."""
        return self.context.sample("names-true-embedding", self.styled, self.true_embeddings)

    @cached_property
    def from_prior_styled(self) -> Tensor:
        """Samples for the names with their style, from the prior's image embeddings."""
        return self.context.sample("names-styled", self.styled)

    def upsampled(self, size: int, count: int) -> Tensor:
        """The first `count` of `from_prior` through the upsampler, uint8 [count, 3, size, size]."""
        low = self.from_prior[:count]
        texts = [prompt.text for prompt in self.prompts[:count]]
        large = self.context.upsample(f"upsampled-names-{low.shape[-1]}-{size}", texts, uint8_to_float(low), size)
        return float_to_uint8(large)

    def nearest(self, images: Tensor) -> Match:
        """For each of the names' images the most similar real render of the name, of any style."""
        return nearest_icon(images, self.icons, self.of_name)

    @cached_property
    def nearest_to_prior(self) -> Match:
        """`nearest` of the images `from_prior`."""
        return self.nearest(self.from_prior)

    @cached_property
    def nearest_to_true(self) -> Match:
        """`nearest` of the images `from_true`."""
        return self.nearest(self.from_true)

    @cached_property
    def nearest_to_jittered(self) -> Match:
        """`nearest` of the real renders `jittered`."""
        return self.nearest(self.jittered)


def styles_of(icons: IconSet, concept: str) -> list[int]:
    """A concept's rows, one in each style that has it, without a skin tone if possible."""
    return [rows[0] for rows in icons.by_concept[concept].values()]


def trained_icon(icons: IconSet, prompt: Prompt) -> int:
    """A row of the prompt's concept that was trained on: in the style of the prompt's truth, or in the next such style."""
    (concept,) = prompt.right
    styles = list(icons.by_concept[concept])
    first = styles.index(prompt.truth.style)
    order = styles[first:] + styles[:first]
    seen = next((style for style in order if split_of_icon(concept, style) == "train"), order[0])
    return icons.by_concept[concept][seen][0]
