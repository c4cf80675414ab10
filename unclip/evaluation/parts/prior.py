"""The prior beside what could stand for it."""

# N pictures, D embedding dimension

import torch
from torch import Tensor

from .. import prompts as ask
from ..bench import Bench
from ..metrics import Estimate, frechet, jackknife, mean
from ..prompts import Prompt
from ..report import Part, Sheet, Table

TURNS = 3  # 793 names of split test, 769 of dev: more than the 2,000 pictures of other distances
WAYS = ("prior", "text embedding", "no prior", "true embedding")


def measure(bench: Bench) -> Part:
    """The paper's section 5.1: the decoder after the prior, after the text embedding in its place, and after neither.

    And after the real picture's embedding, which says more of it than its caption, and any prior, could. Distances are to
    real renders of the same captions, as in the paper's table 2: beside those to other ones, half as uncertain or less. Names
    are too few for them, and so come `TURNS` times, by other seeds and beside other renders.
    """
    turns = [bench.cut(ask.recognition(bench.icons, bench.split, turn)) for turn in range(TURNS)]
    scenes = ask.scenes(bench.icons, bench.split, bench.count(bench.scenes))
    asked = {"names": [p for prompts in turns for p in prompts], "scenes": scenes}
    units = {"names": torch.arange(len(turns[0])).repeat(TURNS), "scenes": torch.arange(len(scenes))}
    real = {kind: bench.judge.see(bench.truths(prompts))[1] for kind, prompts in asked.items()}
    bench.pipe._prepare()  # the dtype that the embeddings below shall have
    null = bench.pipe.text_proj.learned_classifier_free_guidance_embeddings.detach()

    def draw(way: str, folder: str, prompts: list[Prompt], turn: int = 0) -> Tensor:
        embeds = None
        if way == "text embedding":
            embeds = bench.clip.encode_text([p.text for p in prompts])
        elif way == "no prior":
            embeds = null.expand(len(prompts), -1)
        elif way == "true embedding":
            embeds = bench.true_embeddings(prompts)
        return bench.draw(folder if way == "prior" else folder + _after(way), prompts, embeds, turn)

    results, rows, shown, firsts, features = {}, [], [], {}, {}
    for way in WAYS:
        names = torch.cat([draw(way, "recognition", prompts, turn) for turn, prompts in enumerate(turns)])
        drawn = {"names": names, "scenes": draw(way, "scenes", scenes)}
        first, five = (hits.view(TURNS, -1) for hits in bench.named(drawn["names"], asked["names"]))
        firsts[way], features[way] = first.mean(0), {kind: bench.judge.see(seen)[1] for kind, seen in drawn.items()}
        distances = {kind: jackknife(frechet, seen, real[kind], units[kind]) for kind, seen in features[way].items()}
        results[way] = {"r1": mean(firsts[way]), "r5": mean(five.mean(0)), "frechet_distance": distances}
        rows.append([way, results[way]["r1"], results[way]["r5"], *map(distances.get, asked)])
        texts = [p.text for p in turns[0][:12]]
        shown.append(Sheet(f"Drawn after: {way}", drawn["names"][: len(texts)], texts, first[0, :12].bool().tolist()))

    def nearer(x: Tensor, y: Tensor) -> float:
        """How much nearer to `y` the second half of the columns of `x` is than the first."""
        other, ours = x.chunk(2, 1)
        return frechet(other, y) - frechet(ours, y)

    ahead = {}
    for way in ("text embedding", "no prior"):
        both = {kind: torch.cat([seen, features["prior"][kind]], 1) for kind, seen in features[way].items()}
        less = {kind: jackknife(nearer, pairs, real[kind], units[kind]) for kind, pairs in both.items()}
        ahead[way] = {"r1": mean(firsts["prior"] - firsts[way]), "frechet_distance": less}
    cosines = _cosines(bench, scenes)
    results |= {"ahead": ahead, "cosine": cosines}
    counts = f"{len(turns[0])} names, each drawn {TURNS} times, and {len(scenes)} scenes"
    note = f"{counts}, the same prompts and seeds for each; Fréchet distances to real renders of the same captions."
    columns = ["", "R@1", "R@5", "Fréchet distance, names", "Fréchet distance, scenes"]
    first = Table("What stands for the image embedding", columns, rows, note)
    gains = [[f"than {way}", found["r1"], *map(found["frechet_distance"].get, asked)] for way, found in ahead.items()]
    note = "The prior's advantage, prompt by prompt, the seeds the same: more names first, less distance."
    gain = Table("How much better with the prior", [columns[0], columns[1], *columns[3:]], gains, note)
    second = Table("Cosine of image embeddings", ["", "cosine"], list(cosines.items()), "On the same scenes.")
    return Part("prior", results, [first, gain, second, *shown])


def led_by_prior(name: str) -> bool:
    """Whether pictures called `name` were drawn after the prior."""
    return not any(_after(way) in name for way in WAYS[1:])


def _after(way: str) -> str:
    return f"-{way.replace(' ', '-')}"


def _cosines(bench: Bench, prompts: list[Prompt]) -> dict[str, Estimate]:
    """How near the prior's and the text's embeddings come to those of the real pictures."""
    prior = bench.prior_embeddings(prompts)
    text = bench.clip.encode_text([p.text for p in prompts]).cpu()
    true = bench.true_embeddings(prompts).cpu()
    pairs = {
        "prior, true": (prior, true),
        "text, true": (text, true),
        "prior, text": (prior, text),
        "another scene's, true": (true.roll(1, 0), true),
    }
    return {name: mean((a * b).sum(1)) for name, (a, b) in pairs.items()}
