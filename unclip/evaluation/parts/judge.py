"""The judge's own accuracy on real renders."""

import torch

from ...data.distort import DISTORTIONS
from ...data.judged import distorted_icons, icon_rows
from ..context import EvaluationContext
from ..metrics import mean
from ..report import Part, Table

CHECKED = 500


def measure(context: EvaluationContext) -> Part:
    """Recall of the judge on real renders, clean and with distortions that it was not trained with."""
    rows = icon_rows(context.icons, context.limited_count(CHECKED), seed=1)
    concepts = [(context.icons.icons[row]["concept"],) for row in rows]
    hits = {
        kind or "clean": context.concept_recall(distorted_icons(context.icons, rows, kind, seed=1), concepts)[0]
        for kind in (None, *DISTORTIONS)
    }
    found = {kind: mean(values) for kind, values in hits.items()}
    found["damaged"] = mean(torch.cat([hits[kind] for kind in DISTORTIONS]))
    note = f"R@1 among {len(context.icons.recognisable)} names. The damage is none that it was trained with."
    return Part("judge", found, [Table("The judge on real renders", ["renders", "R@1"], list(found.items()), note, True)])
