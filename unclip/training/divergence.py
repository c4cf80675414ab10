"""Stopping a run whose loss is not finite or explodes."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from .checkpointer import Checkpointer
from .config import TrainConfig
from .distributed import Distributed

MEDIAN_OF = 100  # losses of the steps before, which a loss is compared with
FEWEST = 20  # of them


class DivergenceMonitor:
    """Checks the loss of every backward pass and the gradient norm of every step.

    On a CPU a step is checked before the weights change. Reading the losses from another device would synchronise every
    step: there the steps are checked together, before anything is logged, saved, validated or sampled.
    """

    def __init__(self, config: TrainConfig, distributed: Distributed, checkpointer: Checkpointer):
        self.config, self.distributed, self.checkpointer = config, distributed, checkpointer
        self.checks_every_step = distributed.device.type == "cpu"
        self.recent: deque[float] = deque(maxlen=MEDIAN_OF)  # losses of the steps before this one
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []  # step, losses of its passes, gradient norm

    def load(self, recent: Iterable[float]) -> None:
        """Continue from the losses of the steps before."""
        self.recent.extend(recent)

    def record(self, step: int, losses: list[Tensor], norm: Tensor) -> None:
        """Add step `step` (from 0): the losses of its backward passes and its gradient norm. Raises as `check` does."""
        self._unchecked.append((step, torch.stack(losses), norm))
        if self.checks_every_step:
            self.check()

    def check(self) -> None:
        """Check the steps that were not checked yet.

        Raises FloatingPointError, on every process, that names the step, its samples and the last good checkpoint.
        """
        unchecked, self._unchecked = self._unchecked, []
        for step, losses, norm in unchecked:
            self._check(step, losses.tolist(), float(norm))

    def _check(self, step: int, losses: list[float], norm: float) -> None:
        loss = sum(losses) / len(losses)
        median = statistics.median(self.recent) if len(self.recent) >= FEWEST else math.inf
        exploded = self.config.explosion and median > 0 and loss > self.config.explosion * median
        # with fp16 the loss scaler skips such a step itself
        lost = not math.isfinite(norm) and self.distributed.accelerator.scaler is None
        self.recent.append(loss)
        if not any(self.distributed.any(not math.isfinite(loss) or lost or exploded)):
            return
        by_process = self.distributed.gather(losses)
        if not self.distributed.is_main:
            raise SystemExit(1)
        every = [value for row in by_process for value in row]
        if not all(map(math.isfinite, every)):
            what, wrong = "is not finite", [not math.isfinite(v) for v in every]
        elif not math.isfinite(norm):
            what, wrong = f"is {loss:.4g} and its gradient not finite", [True] * len(every)
        else:
            what, wrong = f"is {loss:.4g}, {loss / median:.3g} times the median before it", [v == max(every) for v in every]
        where = f"the loss of step {step + 1} {what}, on samples {', '.join(self._samples(step, wrong))}"
        # the newest checkpoint is suspect if no step was taken since: its weights led here
        suspect = self.checkpointer.set_aside_suspect(step)
        aside = f"; {suspect} holds the weights that led here" if suspect else ""
        raise FloatingPointError(f"{where}{aside}; last good checkpoint: {self.checkpointer.last()}")

    def _samples(self, step: int, wrong: list[bool]) -> list[str]:
        """Ranges of the sample indices of the passes that are `wrong`, which come by process and then by pass."""
        size, parts, processes = self.config.batch_size, self.config.gradient_accumulation, self.distributed.processes
        starts = [(part * processes + rank) * size for rank in range(processes) for part in range(parts)]
        first = step * self.distributed.samples_per_step(self.config)
        return [f"{first + s}-{first + s + size - 1}" for s, bad in sorted(zip(starts, wrong, strict=True)) if bad]
