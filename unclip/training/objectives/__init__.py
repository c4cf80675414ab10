"""What each stage learns: its networks, its loss, its examples, and how progress is measured and shown."""

from importlib import import_module
from typing import Any

from ...runtime.config import ConfigError, construct, nearest
from .base import Objective

__all__ = ["STAGES", "Objective", "create", "objective_class"]

# The class of each stage by its module in this package, which is imported when the stage is trained.
STAGES = {
    "clip": "clip.ClipObjective",
    "prior": "prior.PriorObjective",
    "prior_autoregressive": "prior_autoregressive.AutoregressivePriorObjective",
    "text_proj": "text_proj.TextProjObjective",
    "draft": "draft.DraftObjective",
    "layout": "layout.LayoutObjective",
    "decoder": "decoder.DecoderObjective",
    "decoder_distill": "decoder_distill.DecoderDistillObjective",
    "upsampler_256": "upsampler.UpsamplerObjective",
    "upsampler_1024": "upsampler.UpsamplerObjective",
    "judge": "judge.JudgeObjective",
}


def objective_class(stage: str) -> type[Objective]:
    """The class of a stage. Raises ConfigError, naming the nearest one, for a stage that there is not."""
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}{nearest(stage, STAGES)}; choose from {', '.join(STAGES)}")
    module, _, name = STAGES[stage].partition(".")
    return getattr(import_module(f".{module}", __name__), name)


def create(stage: str, config: dict[str, Any], seed: int) -> Objective:
    """The objective of a stage, from its `data`, `model` and `objective` sections."""
    return construct(
        objective_class(stage),
        config.get("objective"),
        "objective",
        model=config.get("model", {}),
        data=config.get("data", {}),
        seed=seed,
    )
