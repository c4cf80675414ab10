"""Single concepts by their names, as the judge names what was drawn."""

# N pictures, T captions

import torch
from torch import Tensor

from .. import prompts as ask
from ..bench import Bench
from ..metrics import mean, ratio
from ..prompts import Prompt
from ..report import Part, Sheet, Table

SHOWN = 48


def measure(bench: Bench) -> Part:
    """Single concepts by their names: does the judge find the name among all names?"""
    prompts = bench.cut(ask.recognition(bench.icons, bench.split))
    drawn, real = bench.draw("recognition", prompts), bench.truths(prompts)
    known = torch.tensor([p.known for p in prompts])
    groups = {"all": torch.ones_like(known), "concepts that CLIP was trained on": known, "concepts held out of it": ~known}
    return retrieval(bench, "recognition", "Single concepts", prompts, drawn, real, groups)


def retrieval(
    bench: Bench, name: str, title: str, prompts: list[Prompt], drawn: Tensor, real: Tensor, groups: dict[str, Tensor]
) -> Part:
    ours, theirs = bench.named(drawn, prompts), bench.named(real, prompts)
    chance = bench.right(prompts).float().mean(1)
    results, rows = {}, []
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
    results["prompts"] = [
        {"prompt": p.text, "seed": bench.gallery.seed + n, "first": bool(a), "first_five": bool(b), "real_first": bool(c)}
        for n, (p, a, b, c) in enumerate(zip(prompts, *ours, theirs[0], strict=True))
    ]
    note = f"R@1 and R@5 among {len(bench.icons.recognisable)} names; one picture a prompt, nothing selected."
    columns = ["prompts", "R@1", "R@5", "real R@1", "real R@5", "R@1 of real's", "chance"]
    shown = SHOWN if name == "recognition" else len(prompts)
    marks = ours[0].bool().tolist()
    sheet = Sheet(f"The first {min(shown, len(prompts))}", drawn[:shown], [p.text for p in prompts[:shown]], marks[:shown])
    return Part(name, results, [Table(title, columns, rows, note, True), sheet])
