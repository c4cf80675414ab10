"""Single concepts by their names: does the judge recognise the samples?"""

# N images, T captions

from typing import Any

import torch
from torch import Tensor

from .. import prompts as prompt_sets
from ..context import EvaluationContext
from ..metrics import mean, ratio
from ..prompts import Prompt
from ..report import Part, Sheet, Table

SHOWN = 48


def measure(context: EvaluationContext) -> Part:
    """Single concepts by their names: does the judge find the name among all names?"""
    prompts = context.limited(prompt_sets.recognition(context.icons, context.split))
    known = torch.tensor([p.known for p in prompts])
    groups = {"all": torch.ones_like(known), "concepts that CLIP was trained on": known, "concepts held out of it": ~known}
    return retrieval(context, "recognition", "Single concepts", prompts, groups)


def retrieval(context: EvaluationContext, name: str, title: str, prompts: list[Prompt], groups: dict[str, Tensor]) -> Part:
    """Recall of the prompts' names for samples and real renders, by `groups` of prompts (bool [N]).

    `name` is that of the part and of the samples' folder.
    """
    drawn, real = context.sample(name, prompts), context.real_renders(prompts)
    ours, theirs = context.name_recall(drawn, prompts), context.name_recall(real, prompts)
    chance = context.correct_names([prompt.right for prompt in prompts]).float().mean(1)
    results: dict[str, Any] = {}
    rows = []
    for group, member in groups.items():
        if not member.any():
            continue
        found = {
            "r1": mean(ours[0][member]),
            "r5": mean(ours[1][member]),
            "real_r1": mean(theirs[0][member]),
            "real_r5": mean(theirs[1][member]),
            "share_of_real": ratio(ours[0][member], theirs[0][member]),
            "chance": chance[member].mean().item(),
        }
        results[group] = found
        rows.append([group, *found.values()])
    first_seed = context.sample_store.seed
    results["prompts"] = [
        {
            "prompt": p.text,
            "seed": first_seed + n,
            "first": bool(a),
            "first_five": bool(b),
            "real_first": bool(c),
        }
        for n, (p, a, b, c) in enumerate(zip(prompts, *ours, theirs[0], strict=True))
    ]
    note = f"R@1 and R@5 among {len(context.icons.recognisable)} names; one image a prompt, nothing selected."
    columns = ["prompts", "R@1", "R@5", "real R@1", "real R@5", "R@1 of real's", "chance"]
    shown = SHOWN if name == "recognition" else len(prompts)
    marks = ours[0].bool().tolist()
    sheet = Sheet(f"The first {min(shown, len(prompts))}", drawn[:shown], [p.text for p in prompts[:shown]], marks[:shown])
    return Part(name, results, [Table(title, columns, rows, note, True), sheet])
