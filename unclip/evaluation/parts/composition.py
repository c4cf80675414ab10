"""Held-out combinations of objects and attributes."""

# N images

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import prompts as prompt_sets
from ..context import EvaluationContext
from ..metrics import mean, ratio
from ..prompts import Prompt
from ..report import Part, Sheet, Table


def measure(context: EvaluationContext) -> Part:
    """Held-out combinations: each object among a hundred, and its attribute among all values."""
    results: dict[str, dict[str, Any]] = {}
    rows, sheets = [], []
    for kind, prompts in prompt_sets.composition(
        context.icons, context.split, context.limited_count(prompt_sets.PER_KIND)
    ).items():
        if not prompts:
            continue
        images = context.sample(f"composition-{kind}", prompts)
        drawn, chance = answers_of(context, images, prompts)
        real, _ = answers_of(context, context.real_renders(prompts), prompts)
        groups = {kind: torch.ones(len(prompts), dtype=torch.bool)}
        if kind == "pair":
            groups["unrelated"] = torch.tensor(
                [len({context.icons.groups[c] for c in p.composition.concepts}) == 2 for p in prompts]
            )
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
        sheets.append(Sheet(kind, images[:24], [p.text for p in prompts[:24]], marks[:24]))
    note = (
        "Combinations that were held out of training, of parts that were in it. Each object is distinguished from 99 others; "
        "two by a detector that compares each half of the image, in the judge's embeddings, with the renders of every concept. "
        "Unrelated: the pairs whose two objects are of different groups, as an animal and a tool."
    )
    columns = ["kind", "what is right", "drawn", "real renders", "of real's", "chance"]
    return Part("composition", results, [Table("Composition", columns, rows, note, True), *sheets])


def answers_of(context: EvaluationContext, images: Tensor, prompts: list[Prompt]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """For each question, and for all together: in which images it is right [N], and the chance level.

    The judge answers questions of one object, by captions; the detector those of two. All prompts have one object, or all two.
    """
    questions_of = [prompt_sets.questions(p, context.icons) for p in prompts]
    if len(prompts[0].composition.concepts) == 2:
        seen = context.pair_detector.similarities(images)

        def score(image: Tensor, question: prompt_sets.Question) -> Tensor:
            return context.pair_detector.scores(image, question.options)
    else:
        seen = context.judge.see(images)[0]
        captions = sorted({caption for questions in questions_of for q in questions for caption in q.captions})
        number, words = {c: n for n, c in enumerate(captions)}, context.judge.read(captions)

        def score(image: Tensor, question: prompt_sets.Question) -> Tensor:
            return words[[number[c] for c in question.captions]] @ image

    hits: dict[str, list[float]] = {}
    chances: dict[str, list[float]] = {}

    def record(about: str, hit: bool, chance: float) -> None:
        hits.setdefault(about, []).append(float(hit))
        chances.setdefault(about, []).append(chance)

    for image, questions in zip(seen, questions_of, strict=True):
        right = {}
        for q in questions:
            scores = score(image, q)
            right[q.about] = bool((scores[0] > scores[1:]).all())
            record(q.about, right[q.about], 1 / len(q.options))
        objects = [q for q in questions if q.about.endswith("object")]
        if 1 < len(objects) < len(questions):
            record("both objects", all(right[q.about] for q in objects), _product(objects))
        if len(questions) > 1:
            record("all of it", all(right.values()), _product(questions))
    return {k: torch.tensor(v) for k, v in hits.items()}, {k: float(np.mean(v)) for k, v in chances.items()}


def _product(questions: Sequence[prompt_sets.Question]) -> float:
    return float(np.prod([1 / len(q.options) for q in questions]))
