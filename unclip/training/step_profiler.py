"""A trace of some steps of a run, as torch's profiler writes it."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"


class StepProfiler:
    """Records the steps FIRST to LAST of `steps`, numbered from 1, and writes `profile/steps-FIRST-LAST.RANK.json`.

    The file opens in chrome://tracing and in Perfetto. Steps that are left by an error or a signal are written too.
    """

    def __init__(self, steps: Sequence[int] | None, folder: Path, rank: int, device: torch.device):
        self.steps, self.device = steps, device
        self.path = folder / FOLDER / f"steps-{steps[0]}-{steps[1]}.{rank}.json" if steps else None
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Called before step `step` is taken."""
        if self.steps and self._profile is None and step == self.steps[0]:
            on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.__enter__()

    def after(self, step: int) -> None:
        """Called after step `step` was taken."""
        if self.steps and step >= self.steps[1]:
            self._write()

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write()

    def _write(self) -> None:
        if self._profile is None or self.path is None:
            return
        self._profile.__exit__(None, None, None)
        self.path.parent.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self.path))
        self._profile = None
