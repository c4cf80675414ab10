"""What every part of an evaluation works with: the model, the judge, the icons, and the pictures that were drawn."""

# N pictures, T captions, D embedding dimension

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
from ..pipelines import UnCLIPPipeline, UnCLIPPriorPipeline
from .detector import Detector
from .drawing import Draw, Gallery
from .metrics import recalled
from .prompts import Prompt
from .singles import Singles

SCENES = 2000  # pictures on each side of a distance
PRIOR_BATCH = 32
ENLARGED = 4  # images enlarged at once
TURN = 100_000  # from the seeds of one turn through the same prompts to those of the next


class Impossible(ValueError):
    """A part that this model or these icons do not allow."""


@dataclass
class Bench:
    """What every part works with.

    `limit` caps the images of each kind, for a quick look; `scenes` is the number of scenes by which the part prior compares.
    """

    pipe: UnCLIPPipeline
    judge: Judge
    icons: IconSet
    gallery: Gallery
    split: str
    limit: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    scenes: int = SCENES

    def cut(self, items: Sequence, most: int | None = None) -> list:
        return list(items)[: min((n for n in (self.limit, most) if n is not None), default=None)]

    def count(self, most: int) -> int:
        return most if self.limit is None else min(most, self.limit)

    def draw(self, name: str, prompts: list[Prompt], embeds: Tensor | None = None, turn: int = 0, **changes: Any) -> Tensor:
        """The prompts' pictures at the decoder's size, uint8 [N, 3, S, S]; `embeds` [N, D] in place of the prior's.

        Each `turn` draws them by other seeds.
        """
        settings = self.settings | changes

        def batch(chunk: Sequence[int], generators: list[torch.Generator]) -> Tensor:
            given = {} if embeds is None else {"image_embeds": torch.stack([embeds[n] for n in chunk])}
            texts = [prompts[n].text for n in chunk]
            return self.pipe(texts, generator=generators, size=self.pipe.sizes[0], output_type="pt", **settings, **given).images

        return self.drawn(f"{name}-turn-{turn}" if turn else name, [p.text for p in prompts], batch, first=turn * TURN)

    def drawn(self, name: str, texts: list[str], draw: Draw, batch: int | None = None, first: int = 0) -> Tensor:
        """The gallery's pictures `name`, after a check that those there already are of these texts."""
        listed = self.gallery.folder / name / "prompts.json"
        before = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
        if any(old != new for old, new in zip(before, texts, strict=False)):
            raise ValueError(f"{listed.parent} holds pictures of other prompts; choose another folder or pass --force")
        listed.parent.mkdir(parents=True, exist_ok=True)
        if self.gallery.state.is_main_process:
            said = json.dumps(max(before, texts, key=len), indent=0, ensure_ascii=False)
            write_beside(listed, lambda partial: partial.write_text(said, encoding="utf-8"))
        return self.gallery.pictures(name, len(texts), draw, batch, first)

    def enlarged(self, name: str, texts: list[str], low: Tensor, size: int) -> Tensor:
        """Images [N, 3, s, s] in [0, 1] through the model's upsamplers: [N, 3, size, size] in [0, 1]."""

        def batch(chunk: Sequence[int], generators: list[torch.Generator]) -> Tensor:
            return self.pipe.upsample(low[list(chunk)], size, generators)

        return self.drawn(name, texts, batch, batch=ENLARGED).float() / 255

    def truths(self, prompts: list[Prompt]) -> Tensor:
        """Real renders of the prompts, uint8 [N, 3, 64, 64]."""
        pictures = np.stack([self.icons.pixels(p.truth) for p in prompts])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def true_embeddings(self, prompts: list[Prompt]) -> Tensor:
        """The embeddings [N, D] that the model's own CLIP gives real renders of the prompts."""
        return torch.cat([self.clip.encode_image(chunk.float() / 255) for chunk in self.truths(prompts).split(64)])

    def prior_embeddings(self, prompts: list[Prompt]) -> Tensor:
        """The embeddings [N, D] that the prior samples for the prompts, of unit length; number n by the seed of image n."""
        source = UnCLIPPriorPipeline.from_pipe(self.pipe)
        source.set_progress_bar_config(disable=True)
        settings = {k: v for k, v in self.settings.items() if k.startswith("prior")}
        sampled = []
        for start in range(0, len(prompts), PRIOR_BATCH):
            chunk = prompts[start : start + PRIOR_BATCH]
            generators = [torch.Generator().manual_seed(self.gallery.seed + start + n) for n in range(len(chunk))]
            sampled.append(source([p.text for p in chunk], generator=generators, **settings).image_embeds.float().cpu())
        return F.normalize(torch.cat(sampled), dim=-1)

    @cached_property
    def singles(self) -> Singles:
        """Single things by their names, which several parts look at."""
        return Singles(self)

    @cached_property
    def names(self) -> Tensor:
        """The judge's embeddings [T, D] of all concepts' names."""
        return self.judge.read(self.icons.recognisable)

    def right(self, prompts: list[Prompt]) -> Tensor:
        """Which names answer each prompt, bool [N, T]."""
        number = {c: n for n, c in enumerate(self.icons.recognisable)}
        table = torch.zeros(len(prompts), len(number), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            table[row, [number[c] for c in prompt.right if c in number]] = True
        return table

    def named(self, pictures: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Whether the judge's first, and one of its first five names for each picture is right; float [N] each."""
        scores, right = self.judge.see(pictures)[0] @ self.names.T, self.right(prompts)
        return recalled(scores, right, 1), recalled(scores, right, 5)

    @cached_property
    def detector(self) -> Detector:
        return Detector(self.judge, self.icons)

    @cached_property
    def clip(self) -> CLIP:
        """The model's own CLIP: what its prior aims at. Raises Impossible where the model has no image tower."""
        if self.pipe.image_encoder is None or self.pipe.feature_extractor is None:
            raise Impossible("this model has no image_encoder and feature_extractor, which the part prior needs")
        return self.pipe.clip
