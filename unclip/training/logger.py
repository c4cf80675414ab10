"""The log of a run: log.jsonl, the progress bar and trackers."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..io.checkpoints import write_beside
from .config import TrainConfig
from .distributed import Distributed


class RunLogger:
    """Writes the rows of a run that is at step `step`; within a `with` there is a progress bar, on the main process.

    Scalars are collected as tensors and read from the device when their means are.
    """

    def __init__(self, config: TrainConfig, settings: Mapping[str, Any], distributed: Distributed, step: int):
        """Drop the log's rows after `step` and start the trackers with the run's `settings`."""
        self.distributed, self.path = distributed, Path(config.output_dir) / "log.jsonl"
        self.samples_per_step = distributed.samples_per_step(config)
        self._scalars: dict[str, list[Tensor]] = {}
        self._drop_rows_after(step)
        if config.trackers:
            more = {"tensorboard": {"purge_step": step + 1}} if step else {}
            distributed.accelerator.init_trackers("unclip", {k: str(v) for k, v in settings.items()}, more)
        self.bar = tqdm(
            total=config.max_steps,
            initial=step,
            desc=config.stage,
            disable=not distributed.is_main,
            mininterval=5,
            file=sys.stderr,
            leave=True,
        )

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def collect(self, passes: list[dict[str, Tensor]]) -> None:
        """Take the scalars of a step's backward passes."""
        for scalars in passes:
            for key, value in scalars.items():
                self._scalars.setdefault(key, []).append(value)
        self.bar.update()

    def means(self) -> dict[str, float]:
        """The means of the scalars since the last call, read from the device at once; NaN is a mean of nothing."""
        collected, self._scalars = self._scalars, {}
        values = {n: [v for v in torch.stack(tensors).tolist() if not math.isnan(v)] for n, tensors in collected.items()}
        return {name: sum(found) / len(found) for name, found in values.items() if found}

    def log(self, kind: str, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Write a row of `kind` ("train" or "validation") after `seconds` of training."""
        if not self.distributed.is_main:
            return
        row = {"kind": kind, "step": step, "samples": step * self.samples_per_step}
        row |= {"seconds": round(seconds, 1)} | {k: round(float(v), 6) for k, v in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.distributed.accelerator.log({f"{kind}/{k}": float(v) for k, v in values.items()}, step=step)
        if kind == "validation":
            self.distributed.report(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        else:
            shown = {"loss": f"{values['loss']:.4f}", "images_per_s": f"{values['images_per_s']:.1f}"}
            shown |= {name: f"{values[name]:.3g}" for name in ("tflops", "mfu", "data_wait_s") if name in values}
            self.bar.set_postfix(shown, refresh=False)

    def _drop_rows_after(self, step: int) -> None:
        """Drop the rows of steps that will be taken again, and a last one that a kill cut short."""
        if not self.distributed.is_main or not self.path.is_file():
            return
        complete = [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
        remaining = "".join(line for line in complete if json.loads(line)["step"] <= step)
        write_beside(self.path, lambda partial: partial.write_text(remaining, encoding="utf-8"))
