"""Validation, sample images and pipeline components of a run's averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from .checkpointer import Checkpointer
from .distributed import Distributed
from .ema import PowerEMA
from .objectives import Objective
from .sharding import Shards


class Evaluator:
    """Uses the averaged weights, or the trained ones where there is no average, on the main process."""

    def __init__(
        self,
        objective: Objective,
        ema: PowerEMA | None,
        shards: Shards | None,
        checkpointer: Checkpointer,
        distributed: Distributed,
    ):
        self.objective, self.ema, self.shards = objective, ema, shards
        self.checkpointer, self.distributed = checkpointer, distributed

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within a `with`, the objective is in evaluation mode with the averaged weights, on the main process."""
        self.objective.eval()
        if self.shards:
            with self.shards.gathered(self.ema.shadow if self.ema else self.objective.trained_parameters()):
                yield
        elif self.ema and self.distributed.is_main:
            with self.ema.applied(self.objective.trained_parameters()):
                yield
        else:
            yield
        self.objective.train()

    def validate(self) -> dict[str, float]:
        """Held-out metrics; empty on the other processes."""
        with self.averaged(), self.distributed.accelerator.autocast():
            metrics = self.objective.validate() if self.distributed.is_main else {}
        self.distributed.accelerator.wait_for_everyone()
        return metrics

    def sample(self, step: int) -> None:
        """Save sample images as `samples/STEP.png`, if the stage makes any."""
        with self.averaged(), self.distributed.accelerator.autocast():
            image = self.objective.sample() if self.distributed.is_main else None
            if image is not None:
                folder = self.checkpointer.folder / "samples"
                folder.mkdir(exist_ok=True)
                image.save(folder / f"{step:08d}.png")
        self.distributed.accelerator.wait_for_everyone()

    def write(self, name: str) -> None:
        """Write the components for a pipeline: to `latest/` while the run goes on, to `final/` at its end."""
        with self.averaged():
            self.checkpointer.write_components(name, self.objective.write)
