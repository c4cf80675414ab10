"""What each stage learns: its networks, its loss, its examples, and how progress is measured and shown."""

from .base import Objective

__all__ = ["Objective", "create"]


def create(stage: str, config: dict, seed: int) -> Objective:
    """The objective of a stage, from its `data`, `model` and `objective` sections."""
    from ...runtime.config import ConfigError, construct, nearest
    from .clip import ClipObjective
    from .decoder import DecoderObjective
    from .decoder_distill import DecoderDistillObjective
    from .draft import DraftObjective
    from .judge import JudgeObjective
    from .prior import PriorObjective
    from .prior_autoregressive import AutoregressivePriorObjective
    from .text_proj import TextProjObjective
    from .upsampler import UpsamplerObjective

    stages = {
        "clip": ClipObjective,
        "prior": PriorObjective,
        "prior_autoregressive": AutoregressivePriorObjective,
        "text_proj": TextProjObjective,
        "draft": DraftObjective,
        "decoder": DecoderObjective,
        "decoder_distill": DecoderDistillObjective,
        "upsampler_256": UpsamplerObjective,
        "upsampler_1024": UpsamplerObjective,
        "judge": JudgeObjective,
    }
    if stage not in stages:
        raise ConfigError(f"unknown stage {stage!r}{nearest(stage, stages)}; choose from {', '.join(stages)}")
    return construct(
        stages[stage],
        config.get("objective"),
        "objective",
        model=config.get("model", {}),
        data=config.get("data", {}),
        seed=seed,
    )
