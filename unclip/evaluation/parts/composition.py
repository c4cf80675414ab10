"""Held-out combinations of objects and attributes."""

# N pictures

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import prompts as ask
from ..bench import Bench
from ..metrics import mean, ratio
from ..prompts import Prompt
from ..report import Part, Sheet, Table


def measure(bench: Bench) -> Part:
    """Held-out combinations: each object among a hundred, and what is said of it among all that could be said."""
    results, rows, sheets = {}, [], []
    for kind, prompts in ask.composition(bench.icons, bench.split, bench.count(ask.PER_KIND)).items():
        if not prompts:
            continue
        pictures = bench.draw(f"composition-{kind}", prompts)
        drawn, chance = answered(bench, pictures, prompts)
        real, _ = answered(bench, bench.truths(prompts), prompts)
        groups = {kind: torch.ones(len(prompts), dtype=torch.bool)}
        if kind == "pair":
            groups["unrelated"] = torch.tensor([len({bench.icons.groups[c] for c in p.plan.concepts}) == 2 for p in prompts])
        for group, member in groups.items():
            if not member.any():
                continue
            chosen = member.nonzero()[:, 0].tolist()
            results[group] = {
                "prompts": [prompts[n].text for n in chosen],
                "pictures": [f"composition-{kind}/{n:05d}.png" for n in chosen],
            }
            for about in drawn:
                found = {
                    "right": mean(drawn[about][member]),
                    "real": mean(real[about][member]),
                    "share_of_real": ratio(drawn[about][member], real[about][member]),
                    "chance": chance[about],
                }
                results[group][about] = found
                rows.append([group, about, *found.values()])
        marks = drawn[list(drawn)[-1]].bool().tolist()
        sheets.append(Sheet(kind, pictures[:24], [p.text for p in prompts[:24]], marks[:24]))
    note = (
        "Combinations that were held out of training, of parts that were in it. Each object is told from 99 others; two by "
        "a detector that compares each half of the picture, in the judge's embeddings, with the renders of every concept. "
        "Unrelated: the pairs whose two objects are of different groups, as an animal and a tool."
    )
    columns = ["kind", "what is right", "drawn", "real renders", "of real's", "chance"]
    return Part("composition", results, [Table("Composition", columns, rows, note, True), *sheets])


def answered(bench: Bench, pictures: Tensor, prompts: list[Prompt]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """For each thing asked, and for all together: which pictures answer rightly [N], and what chance gives.

    Of one object the judge is asked, by captions; of two the detector. The prompts are all of one or all of two.
    """
    asked = [ask.questions(p, bench.icons) for p in prompts]
    if len(prompts[0].plan.concepts) == 2:
        seen = bench.detector.look(pictures)

        def fit(picture: Tensor, question: ask.Question) -> Tensor:
            return bench.detector.fit(picture, question.options)
    else:
        seen = bench.judge.see(pictures)[0]
        captions = sorted({caption for questions in asked for q in questions for caption in q.captions})
        number, words = {c: n for n, c in enumerate(captions)}, bench.judge.read(captions)

        def fit(picture: Tensor, question: ask.Question) -> Tensor:
            return words[[number[c] for c in question.captions]] @ picture

    hits: dict[str, list[float]] = {}
    chances: dict[str, list[float]] = {}

    def note(about: str, hit: bool, chance: float) -> None:
        hits.setdefault(about, []).append(float(hit))
        chances.setdefault(about, []).append(chance)

    for picture, questions in zip(seen, asked, strict=True):
        right = {}
        for q in questions:
            scores = fit(picture, q)
            right[q.about] = bool((scores[0] > scores[1:]).all())
            note(q.about, right[q.about], 1 / len(q.options))
        objects = [q for q in questions if q.about.endswith("object")]
        if 1 < len(objects) < len(questions):
            note("both objects", all(right[q.about] for q in objects), _product(objects))
        if len(questions) > 1:
            note("all of it", all(right.values()), _product(questions))
    return {k: torch.tensor(v) for k, v in hits.items()}, {k: float(np.mean(v)) for k, v in chances.items()}


def _product(questions: Sequence[ask.Question]) -> float:
    return float(np.prod([1 / len(q.options) for q in questions]))
