"""Everyday English, as the judge names what was drawn."""

import torch

from .. import prompts as ask
from ..bench import Bench, Impossible
from ..report import Part
from .recognition import retrieval


def measure(bench: Bench) -> Part:
    """Everyday English: is the judge's name for the picture one of the acceptable ones?"""
    prompts = bench.cut(ask.everyday(bench.icons, bench.split))
    if not prompts:
        raise Impossible("these icons answer no everyday prompt")
    drawn, real = bench.draw("everyday", prompts), bench.truths(prompts)
    groups = {"all": torch.ones(len(prompts), dtype=torch.bool)}
    return retrieval(bench, "everyday", "Everyday English", prompts, drawn, real, groups)
