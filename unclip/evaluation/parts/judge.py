"""The judge itself on real renders: how far its word holds."""

import torch

from ...data.distort import DISTORTIONS
from ...data.judged import distorted_icons, icon_rows
from ..bench import Bench
from ..metrics import mean
from ..prompts import Prompt
from ..report import Part, Table

CHECKED = 500


def measure(bench: Bench) -> Part:
    """How often the judge names real renders, clean and under damage that it was not trained with."""
    rows = icon_rows(bench.icons, bench.count(CHECKED), seed=1)
    wanted = [Prompt("", None, (bench.icons.icons[r]["concept"],)) for r in rows]
    hits = {
        kind or "clean": bench.named(distorted_icons(bench.icons, rows, kind, seed=1), wanted)[0]
        for kind in (None, *DISTORTIONS)
    }
    found = {kind: mean(values) for kind, values in hits.items()}
    found["damaged"] = mean(torch.cat([hits[kind] for kind in DISTORTIONS]))
    note = f"R@1 among {len(bench.icons.recognisable)} names. The damage is none that it was trained with."
    return Part("judge", found, [Table("The judge on real renders", ["renders", "R@1"], list(found.items()), note, True)])
