"""Prompts in everyday English: does the judge recognise the samples?"""

import torch

from .. import prompts as prompt_sets
from ..context import EvaluationContext, UnsupportedPart
from ..report import Part
from .recognition import retrieval


def measure(context: EvaluationContext) -> Part:
    """Everyday English: is the judge's name for the image one of the acceptable ones?"""
    prompts = context.limited(prompt_sets.everyday(context.icons, context.split))
    if not prompts:
        raise UnsupportedPart("these icons answer no everyday prompt")
    groups = {"all": torch.ones(len(prompts), dtype=torch.bool)}
    return retrieval(context, "everyday", "Everyday English", prompts, groups)
