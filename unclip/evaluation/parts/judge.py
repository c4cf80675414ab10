"""The judge's own accuracy on real renders."""

import torch

from ...data.distort import DISTORTIONS
from ...data.judged import distorted_icons, icon_rows
from ..context import EvaluationContext
from ..metrics import mean
from ..prompts import Prompt
from ..report import Part, Table

CHECKED = 500


def measure(context: EvaluationContext) -> Part:
    """Recall of the judge on real renders, clean and with distortions that it was not trained with."""
    rows = icon_rows(context.icons, context.limited_count(CHECKED), seed=1)
    wanted = [Prompt("", None, (context.icons.icons[r]["concept"],)) for r in rows]
    hits = {
        kind or "clean": context.name_recall(distorted_icons(context.icons, rows, kind, seed=1), wanted)[0]
        for kind in (None, *DISTORTIONS)
    }
    found = {kind: mean(values) for kind, values in hits.items()}
    found["damaged"] = mean(torch.cat([hits[kind] for kind in DISTORTIONS]))
    note = f"R@1 among {len(context.icons.recognisable)} names. The damage is none that it was trained with."
    return Part("judge", found, [Table("The judge on real renders", ["renders", "R@1"], list(found.items()), note, True)])
