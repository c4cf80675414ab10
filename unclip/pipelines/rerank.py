"""Reranking: CLIP ranks many samples of a prompt, as in DALL·E 1 (arXiv 2102.12092, section 2.6)."""

import heapq
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import UnCLIPPipeline


def rerank(  # noqa: PLR0913 - a public call
    pipe: UnCLIPPipeline,
    prompt: str,
    candidates: int,
    keep: int,
    seed: int = 0,
    batch: int = 16,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    **settings: Any,
) -> list[tuple[float, int]]:
    """The `keep` best of `candidates` images of a prompt: (cosine to the prompt, seed), best first.

    Candidate n has the seed `seed + n`, so that the best ones can be sampled again at any size. Candidates are sampled
    and ranked at the decoder's size, `batch` at a time, and discarded: memory does not grow with their number. Raises
    ValueError for numbers out of range and for a checkpoint without an image tower.
    """
    if not 1 <= keep <= candidates:
        raise ValueError(f"keep must be from 1 to the number of candidates ({candidates}), got {keep}")
    if pipe.image_encoder is None or pipe.feature_extractor is None:
        raise ValueError("this checkpoint has no image_encoder and feature_extractor to rank with")
    wanted: Tensor | None = None
    best: list[tuple[float, int]] = []
    for start in progress(range(0, candidates, batch)):
        seeds = [seed + n for n in range(start, min(start + batch, candidates))]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        options: dict[str, Any] = {"generator": generators, "size": pipe.sizes[0], "output_type": "pt"}
        images = pipe([prompt] * len(seeds), **options, **settings)[0]
        clip = pipe.clip  # after the first call, which sets the dtype
        if wanted is None:
            wanted = clip.encode_text(prompt)[0]
        scores = (clip.encode_image(images.float()) @ wanted).tolist()
        best = heapq.nlargest(keep, [*best, *zip(scores, seeds, strict=True)])
    return best
