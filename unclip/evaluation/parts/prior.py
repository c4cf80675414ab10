"""The prior compared with other image embeddings in its place."""

# N images, D embedding dimension

from typing import Any

import torch
from torch import Tensor

from .. import prompts as prompt_sets
from ..context import EvaluationContext
from ..metrics import Estimate, frechet, jackknife, mean
from ..prompts import Prompt
from ..report import Part, Sheet, Table

TURNS = 3  # 793 names of split test, 769 of dev: more than the 2,000 images of other distances
WAYS = ("prior", "text embedding", "no prior", "true embedding")


def measure(context: EvaluationContext) -> Part:
    """The paper's section 5.1: the decoder with the prior's image embedding, with the text embedding, and with none.

    And with the real image's embedding, which holds more than any prior can know from a caption. Distances are to real renders
    of the same captions, as in the paper's table 2, because those to others have intervals at least twice as wide. Names are
    too few for a distance, so they are sampled `TURNS` times, with other seeds and beside other real renders.
    """
    turns = [context.limited(prompt_sets.recognition(context.icons, context.split, turn)) for turn in range(TURNS)]
    scenes = prompt_sets.scenes(context.icons, context.split, context.limited_count(context.scenes))
    asked = {"names": [p for prompts in turns for p in prompts], "scenes": scenes}
    units = {"names": torch.arange(len(turns[0])).repeat(TURNS), "scenes": torch.arange(len(scenes))}
    real = {kind: context.judge.see(context.real_renders(prompts))[1] for kind, prompts in asked.items()}
    context.pipe._prepare()  # sets the dtype of the embeddings below
    null = context.pipe.text_proj.learned_classifier_free_guidance_embeddings.detach()

    def sample(way: str, folder: str, prompts: list[Prompt], turn: int = 0) -> Tensor:
        embeds = None
        if way == "text embedding":
            embeds = context.clip.encode_text([p.text for p in prompts])
        elif way == "no prior":
            embeds = null.expand(len(prompts), -1)
        elif way == "true embedding":
            embeds = context.true_embeddings(prompts)
        return context.sample(folder if way == "prior" else folder + _after(way), prompts, embeds, turn)

    results: dict[str, Any] = {}
    rows, shown, firsts, features = [], [], {}, {}
    for way in WAYS:
        names = torch.cat([sample(way, "recognition", prompts, turn) for turn, prompts in enumerate(turns)])
        drawn = {"names": names, "scenes": sample(way, "scenes", scenes)}
        first, five = (hits.view(TURNS, -1) for hits in context.name_recall(drawn["names"], asked["names"]))
        firsts[way], features[way] = first.mean(0), {kind: context.judge.see(seen)[1] for kind, seen in drawn.items()}
        distances = {kind: jackknife(frechet, seen, real[kind], units[kind]) for kind, seen in features[way].items()}
        results[way] = {"r1": mean(firsts[way]), "r5": mean(five.mean(0)), "frechet_distance": distances}
        rows.append([way, results[way]["r1"], results[way]["r5"], *distances.values()])
        texts = [p.text for p in turns[0][:12]]
        shown.append(Sheet(f"Drawn after: {way}", drawn["names"][: len(texts)], texts, first[0, :12].bool().tolist()))

    def distance_gain(x: Tensor, y: Tensor) -> float:
        """The distance to `y` of the first half of the columns of `x`, less that of the second half."""
        other, ours = x.chunk(2, 1)
        return frechet(other, y) - frechet(ours, y)

    ahead: dict[str, dict[str, Any]] = {}
    for way in ("text embedding", "no prior"):
        both = {kind: torch.cat([seen, features["prior"][kind]], 1) for kind, seen in features[way].items()}
        less = {kind: jackknife(distance_gain, pairs, real[kind], units[kind]) for kind, pairs in both.items()}
        ahead[way] = {"r1": mean(firsts["prior"] - firsts[way]), "frechet_distance": less}
    cosines = _cosines(context, scenes)
    results |= {"ahead": ahead, "cosine": cosines}
    counts = f"{len(turns[0])} names, each drawn {TURNS} times, and {len(scenes)} scenes"
    note = f"{counts}, the same prompts and seeds for each; Fréchet distances to real renders of the same captions."
    columns = ["", "R@1", "R@5", "Fréchet distance, names", "Fréchet distance, scenes"]
    summary = Table("The decoder with different image embeddings", columns, rows, note)
    gains = [[f"than {way}", found["r1"], *map(found["frechet_distance"].get, asked)] for way, found in ahead.items()]
    note = "The prior's advantage, prompt by prompt, the seeds the same: more names first, less distance."
    gain = Table("How much better with the prior", [columns[0], columns[1], *columns[3:]], gains, note)
    second = Table("Cosine of image embeddings", ["", "cosine"], list(cosines.items()), "On the same scenes.")
    return Part("prior", results, [summary, gain, second, *shown])


def depends_on_prior(name: str) -> bool:
    """Whether the images `name` were sampled from the prior's embeddings."""
    return not any(_after(way) in name for way in WAYS[1:])


def _after(way: str) -> str:
    return f"-{way.replace(' ', '-')}"


def _cosines(context: EvaluationContext, prompts: list[Prompt]) -> dict[str, Estimate]:
    """The cosines of the prior's and the text's embeddings to those of the real images."""
    prior = context.prior_embeddings(prompts)
    text = context.clip.encode_text([p.text for p in prompts]).cpu()
    true = context.true_embeddings(prompts).cpu()
    pairs = {
        "prior, true": (prior, true),
        "text, true": (text, true),
        "prior, text": (prior, text),
        "another scene's, true": (true.roll(1, 0), true),
    }
    return {name: mean((a * b).sum(1)) for name, (a, b) in pairs.items()}
