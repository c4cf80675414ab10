"""Attachments: one thing worn, held, ridden, contained by another, or in its corner."""

from typing import Any

import torch

from .. import prompts as prompt_sets
from ..attachment_detector import QUESTIONS, AttachmentDetector
from ..context import EvaluationContext, UnsupportedPart
from ..metrics import mean, ratio
from ..report import Part, Sheet, Table

SHOWN = 60


def measure(context: EvaluationContext) -> Part:
    """Held-out combinations: are base, thing, the thing's place and the relation right?"""
    prompts = prompt_sets.attachments(context.icons, context.split, context.limited_count(prompt_sets.PER_KIND))
    if not prompts:
        raise UnsupportedPart("these icons allow no attachments that were held out")
    drawn, real = context.sample("attachments", prompts), context.real_renders(prompts)
    detector = AttachmentDetector(context.judge, context.icons)
    hits: dict[str, list[list[bool]]] = {about: [] for about in (*QUESTIONS, "all of it")}
    chances: dict[str, list[float]] = {about: [] for about in QUESTIONS}
    for prompt, images in zip(prompts, zip(drawn, real, strict=True), strict=True):
        found, chance = detector.answers(images, prompt.composition)
        found["all of it"] = [all(answers) for answers in zip(*found.values(), strict=True)]
        for about, both in found.items():
            hits[about].append(both)
        for about in QUESTIONS:
            chances[about].append(chance[about])
    right = {about: torch.tensor(pairs).float() for about, pairs in hits.items()}  # [prompts, 2]: drawn, real
    results: dict[str, Any] = {}
    rows = []
    for about, answers in right.items():
        results[about] = _found(answers)
        if about in chances:
            results[about]["chance"] = sum(chances[about]) / len(prompts)
        rows.append([about, *results[about].values(), *([""] if about not in chances else [])])
    relations = [str(prompt.composition.relation) for prompt in prompts]
    for relation in sorted(set(relations)):
        member = torch.tensor([r == relation for r in relations])
        results[relation] = _found(right["all of it"][member])
        rows.append([f"all of it: {relation}", *results[relation].values(), ""])
    results["prompts"] = [prompt.text for prompt in prompts]
    results["pictures"] = [f"attachments/{n:05d}.png" for n in range(len(prompts))]
    note = (
        "Combinations that were held out of training, of parts that were in it. An image is compared, in the judge's image "
        "embeddings, with renders of what it might show: base: other bases, or the thing alone; thing: other things, or the "
        "base alone; place: the thing at 49 places, of which the most similar must be in its own region; relation: the two "
        "swapped, and beside each other."
    )
    table = Table("Attachments", ["what is right", "drawn", "real renders", "of real's", "chance"], rows, note, True)
    texts, marks = results["prompts"], right["all of it"][:, 0].bool().tolist()
    return Part("attachments", results, [table, Sheet(f"The first {SHOWN}", drawn[:SHOWN], texts[:SHOWN], marks[:SHOWN])])


def _found(answers: torch.Tensor) -> dict:
    """Shares of drawn and real images, from `answers` [prompts, 2]."""
    drawn, real = answers.unbind(1)
    return {"right": mean(drawn), "real": mean(real), "share_of_real": ratio(drawn, real)}
