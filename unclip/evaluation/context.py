"""The shared context of an evaluation's parts: the model, the judge, the icons and the sampled images."""

# N images, T captions, D embedding dimension

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.judge import Judge
from ..clip.model import CLIP
from ..data.scenes import IconSet
from ..io.checkpoints import write_beside
from ..io.pixels import uint8_to_float
from ..pipelines import UnCLIPPipeline, UnCLIPPriorPipeline
from .metrics import recall_at
from .pair_detector import PairDetector
from .prompts import Prompt
from .sample_store import BatchSampler, SampleStore
from .single_concepts import SingleConcepts

SCENES = 2000  # images in each of the two sets of a distance
PRIOR_BATCH = 32
UPSAMPLER_BATCH = 4
TURN = 100_000  # offset of the seeds of one turn through the same prompts from those of the turn before


class UnsupportedPart(ValueError):
    """A part that this model or these icons do not support."""


@dataclass
class EvaluationContext:
    """The shared context of all parts.

    Attributes:
        settings: Sampling settings, in place of the model's own.
        limit: Most images of each kind, for a quick look.
        scenes: Number of scenes that the part `prior` samples in each way.
    """

    pipe: UnCLIPPipeline
    judge: Judge
    icons: IconSet
    sample_store: SampleStore
    split: str
    limit: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    scenes: int = SCENES

    def limited(self, items: Sequence, most: int | None = None) -> list:
        """The first `most` items, or fewer with a `limit`."""
        return list(items)[: min((n for n in (self.limit, most) if n is not None), default=None)]

    def limited_count(self, most: int) -> int:
        return most if self.limit is None else min(most, self.limit)

    def sample(self, name: str, prompts: list[Prompt], embeds: Tensor | None = None, turn: int = 0, **changes: Any) -> Tensor:
        """The prompts' images at the decoder's size, uint8 [N, 3, S, S].

        Args:
            name: Of their folder.
            prompts: N prompts; image n has seed n of the `turn`.
            embeds: Image embeddings [N, D] in place of the prior's.
            turn: Number of the pass through these prompts; each has seeds of its own.
            changes: Sampling settings.
        """
        settings = self.settings | changes

        def batch(chunk: Sequence[int], generators: list[torch.Generator]) -> Tensor:
            more: dict[str, Any] = {} if embeds is None else {"image_embeds": torch.stack([embeds[n] for n in chunk])}
            texts = [prompts[n].text for n in chunk]
            pipe: Any = self.pipe  # its call may return a tuple
            return pipe(texts, generator=generators, size=self.pipe.sizes[0], output_type="pt", **settings, **more).images

        return self.sample_or_load(f"{name}-turn-{turn}" if turn else name, [p.text for p in prompts], batch, first=turn * TURN)

    def sample_or_load(
        self, name: str, texts: list[str], sampler: BatchSampler, batch: int | None = None, first: int = 0
    ) -> Tensor:
        """The stored images `name`, sampled where they are missing. Raises ValueError if those stored are of other texts."""
        listed = self.sample_store.folder / name / "prompts.json"
        before = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
        if any(old != new for old, new in zip(before, texts, strict=False)):
            raise ValueError(f"{listed.parent} holds images of other prompts; choose another folder or pass --force")
        listed.parent.mkdir(parents=True, exist_ok=True)
        if self.sample_store.state.is_main_process:
            listing = json.dumps(max(before, texts, key=len), indent=0, ensure_ascii=False)
            write_beside(listed, lambda partial: partial.write_text(listing, encoding="utf-8"))
        return self.sample_store.images(name, len(texts), sampler, batch, first)

    def upsample(self, name: str, texts: list[str], low: Tensor, size: int) -> Tensor:
        """Images [N, 3, s, s] in [0, 1] through the model's upsamplers: [N, 3, size, size] in [0, 1]."""

        def batch(chunk: Sequence[int], generators: list[torch.Generator]) -> Tensor:
            return self.pipe.upsample(low[list(chunk)], size, generators)

        return uint8_to_float(self.sample_or_load(name, texts, batch, batch=UPSAMPLER_BATCH))

    def real_renders(self, prompts: list[Prompt]) -> Tensor:
        """Real renders of the prompts, uint8 [N, 3, 64, 64]."""
        images = np.stack([self.icons.pixels(p.truth) for p in prompts])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def true_embeddings(self, prompts: list[Prompt]) -> Tensor:
        """The embeddings [N, D] that the model's own CLIP gives real renders of the prompts."""
        return torch.cat([self.clip.encode_image(uint8_to_float(chunk)) for chunk in self.real_renders(prompts).split(64)])

    def prior_embeddings(self, prompts: list[Prompt]) -> Tensor:
        """The embeddings [N, D] that the prior samples for the prompts, of unit length; number n by the seed of image n."""
        source: Any = UnCLIPPriorPipeline.from_pipe(self.pipe)
        source.set_progress_bar_config(disable=True)
        settings = {k: v for k, v in self.settings.items() if k.startswith("prior")}
        sampled = []
        for start in range(0, len(prompts), PRIOR_BATCH):
            chunk = prompts[start : start + PRIOR_BATCH]
            generators = [torch.Generator().manual_seed(self.sample_store.seed + start + n) for n in range(len(chunk))]
            sampled.append(source([p.text for p in chunk], generator=generators, **settings).image_embeds.float().cpu())
        return F.normalize(torch.cat(sampled), dim=-1)

    @cached_property
    def single_concepts(self) -> SingleConcepts:
        """Single concepts, which several parts measure."""
        return SingleConcepts(self)

    @cached_property
    def name_embeddings(self) -> Tensor:
        """The judge's embeddings [T, D] of all concepts' names."""
        return self.judge.read(self.icons.recognisable)

    def correct_names(self, right: Sequence[Sequence[str]]) -> Tensor:
        """Which of all names are among the `right` concepts of each of N images, bool [N, T]."""
        number = {c: n for n, c in enumerate(self.icons.recognisable)}
        table = torch.zeros(len(right), len(number), dtype=torch.bool)
        for row, concepts in enumerate(right):
            table[row, [number[c] for c in concepts if c in number]] = True
        return table

    def name_recall(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Recall at 1 and at 5 of the judge's names for each image; float [N] each."""
        return self.concept_recall(images, [prompt.right for prompt in prompts])

    def concept_recall(self, images: Tensor, right: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """The same for images of which these concepts are `right`."""
        scores, correct = self.judge.see(images)[0] @ self.name_embeddings.T, self.correct_names(right)
        return recall_at(scores, correct, 1), recall_at(scores, correct, 5)

    @cached_property
    def pair_detector(self) -> PairDetector:
        return PairDetector(self.judge, self.icons)

    @cached_property
    def clip(self) -> CLIP:
        """The model's own CLIP, in whose space its prior samples. Raises UnsupportedPart if it has no image tower."""
        if self.pipe.image_encoder is None or self.pipe.feature_extractor is None:
            raise UnsupportedPart("this model has no image_encoder and feature_extractor, which the part prior needs")
        return self.pipe.clip
