"""Drawing many and keeping the best: CLIP ranks candidates by their prompt, as DALL·E 1 did (arXiv 2102.12092, section 2.6)."""

import heapq
from collections.abc import Callable, Iterable

import torch

from . import UnCLIPPipeline


def rerank(
    pipe: UnCLIPPipeline,
    prompt: str,
    candidates: int,
    keep: int,
    seed: int = 0,
    batch: int = 16,
    progress: Callable[[Iterable], Iterable] = iter,
    **settings,
) -> list[tuple[float, int]]:
    """The `keep` best of `candidates` images of a prompt: (cosine to the prompt, seed), best first.

    Candidate n has the seed `seed + n`, so that a kept one can be drawn again at any size. Candidates are drawn and
    ranked at the decoder's size, `batch` at a time, and forgotten: memory does not grow with their number. Raises
    ValueError for numbers out of range and for a checkpoint without an image tower.
    """
    if not 1 <= keep <= candidates:
        raise ValueError(f"keep must be from 1 to the number of candidates ({candidates}), got {keep}")
    if pipe.image_encoder is None or pipe.feature_extractor is None:
        raise ValueError("this checkpoint has no image_encoder and feature_extractor to rank with")
    wanted, best = None, []
    for start in progress(range(0, candidates, batch)):
        seeds = [seed + n for n in range(start, min(start + batch, candidates))]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        drawn = pipe([prompt] * len(seeds), generator=generators, size=pipe.sizes[0], output_type="pt", **settings).images
        clip = pipe.clip  # after the first call, which chooses the dtype
        if wanted is None:
            wanted = clip.encode_text(prompt)[0]
        scores = (clip.encode_image(drawn.float()) @ wanted).tolist()
        best = heapq.nlargest(keep, [*best, *zip(scores, seeds, strict=True)])
    return best
