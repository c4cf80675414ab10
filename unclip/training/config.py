"""The configuration of a training run: the keys at the top level of its file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..runtime.config import ConfigError, construct, load_config, nearest

OPTIMIZERS = ("adamw", "muon")
SHARDING = ("none", "zero2", "zero3")
SECTIONS = ("model", "data", "objective")


@dataclass
class TrainConfig:
    """How a stage is trained. `batch_size` is a process's share of one backward pass."""

    stage: str
    output_dir: str
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 500
    cooldown: float = 0.2  # the last share of the steps, over which the rate falls to zero
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    optimizer: str = "adamw"  # or "muon": hidden layers by orthogonalised momentum (arXiv 2502.16982), the rest by AdamW
    clip_norm: float = 1.0  # 0 never clips
    gradient_accumulation: int = 1
    ema: float = 0.1  # width of the average relative to the training so far (EDM2, arXiv 2312.02696, section 3.1)
    ema_decay: float = 0.0  # above 0: a constant decay in place of that width (the paper's Table 3)
    precision: str = "auto"  # "auto", "no", "bf16" or "fp16"
    compile: bool = False
    fused: bool = True  # AdamW in one kernel for all parameters
    sharding: str = "none"  # or ZeRO's stage 2 or 3 (arXiv 1910.02054): what the processes hold in parts
    seed: int = 0
    workers: int = 1
    log_every: int = 50
    save_every: int = 0  # steps; 0 leaves it to save_minutes
    save_minutes: float = 10.0
    keep: int = 2
    validate_every: int = 1000  # steps, and after the last one; 0 is never
    sample_every: int = 1000  # the same for sample images
    init_from: str | None = None
    resume_changed: bool = False  # resume although dataset, CLIP, seed, objective or resolution are others now
    gradient_checkpointing: bool = False  # activations are computed again on the way back (arXiv 1604.06174)
    explosion: float = 100.0  # a loss this many times the median of the steps before it stops the run; 0 never does
    profile_steps: list[int] | None = None  # [first, last]: torch's profiler writes a trace of these steps to profile/
    report_to: list[str] | str | None = None  # trackers beside log.jsonl, by Accelerate's names: tensorboard, wandb, ...
    push_to_hub: str | None = None  # OWNER/NAME: send final/ there when the run is finished

    def __post_init__(self) -> None:
        self.betas = (self.betas[0], self.betas[1])
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        self._check_trackers()
        for name in ("max_steps", "batch_size", "gradient_accumulation", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_choices()
        rates = ("learning_rate", "weight_decay", "eps", "clip_norm", "explosion", "save_minutes")
        for name in (*rates, "warmup_steps", "seed", "workers", "save_every", "validate_every", "sample_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown must be in [0, 1], got {self.cooldown}")
        if not 0 <= self.ema < 0.289:  # a flat profile's standard deviation is 12^-1/2
            raise ValueError(f"ema must be from 0 to less than 0.289, got {self.ema}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to less than 1, got {self.ema_decay}")

        if self.profile_steps is not None and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise ValueError(f"profile_steps must be [first, last] with 1 <= first <= last, got {self.profile_steps}")

    def _check_trackers(self) -> None:
        known, installed = list(LOGGER_TYPE_TO_CLASS), [str(t) for t in get_available_trackers()]
        for tracker in self.trackers:
            if tracker not in known:
                raise ValueError(f"report_to: unknown tracker {tracker!r}{nearest(tracker, known)}; known: {', '.join(known)}")
            if tracker not in installed:
                raise ValueError(f"report_to: {tracker} is not installed: pip install {tracker}")

    def _check_choices(self) -> None:
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(self.push_to_hub)):
            raise ValueError(f"push_to_hub must be OWNER/NAME, got {self.push_to_hub!r}")
        if self.precision not in ("auto", "no", "bf16", "fp16"):
            raise ValueError(f"precision must be auto, no, bf16 or fp16, got {self.precision!r}")
        if self.optimizer not in OPTIMIZERS:
            known = " or ".join(OPTIMIZERS)
            raise ValueError(f"optimizer must be {known}, got {self.optimizer!r}{nearest(str(self.optimizer), OPTIMIZERS)}")
        if self.optimizer == "muon" and self.precision == "fp16":
            raise ValueError("optimizer muon does not go with precision fp16: choose bf16 or no")
        if self.sharding not in SHARDING:
            raise ValueError(f"sharding must be {', '.join(SHARDING[:-1])} or {SHARDING[-1]}, got {self.sharding!r}")

    @property
    def trackers(self) -> list[str]:
        """The trackers of `report_to`."""
        return [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, constant, linear cool-down to zero."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        tail = self.cooldown * self.max_steps
        cool = min(1.0, (self.max_steps - step) / tail) if tail else 1.0
        return self.learning_rate * min(warm, cool)


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> tuple[TrainConfig, dict[str, dict[str, Any]]]:
    """The run that a configuration file describes, and its sections `model`, `data` and `objective`.

    Raises ConfigError, in one line, for keys and values that no run has.
    """
    config = load_config(path, overrides)
    sections = {name: config.pop(name, None) or {} for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{name} must be a section of keys, got {section!r}")
    return construct(TrainConfig, config, "config"), sections
