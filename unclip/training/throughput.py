"""The speed of training, apart from validation, sampling and saving: of the examples, of the device and of the data workers."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ..runtime.profiling import flop_counter, measured_peak
from .objectives import Objective
from .objectives.base import to_device

PEAK_AFTER = 30.0  # seconds of training, after which the second that measuring the device's peak takes is worth it


def flops_per_sample(objective: Objective, batch_size: int) -> int | None:
    """Floating-point operations of a forward and backward pass per sample, without recomputed activations.

    Counted on dummy batches of one and two examples on the CPU, before the networks are sharded, compiled or placed: what
    grows with the batch is a sample's, what does not is shared by `batch_size`. None of an objective without dummy batches.
    """
    try:
        batches = [to_device(objective.dummy_batch(size), torch.device("cpu")) for size in (1, 2)]
    except NotImplementedError:
        return None
    parameters = list(objective.trained_parameters().values())
    counts = []
    with torch.random.fork_rng(devices=[]):
        for batch in batches:
            with flop_counter() as counter:
                torch.autograd.grad(objective.dummy_loss(batch), parameters, allow_unused=True)
            counts.append(counter.get_total_flops())
    of_sample = counts[1] - counts[0]
    return of_sample + (counts[0] - of_sample) // batch_size


class Throughput:
    """Counts steps and seconds of training; `seconds` is their total until the last `lap`.

    `processes` share a step's samples; `flops` are those of a sample. Operations per second and the share of the peak are
    those of one process's device, whose peak is measured in `dtype`.
    """

    def __init__(
        self, samples_per_step: int, processes: int, device: torch.device, dtype: torch.dtype, flops: int | None = None
    ):
        self.samples_per_step, self.processes, self.flops = samples_per_step, processes, flops
        self.device, self.dtype = device, dtype
        self.seconds = 0.0
        self._peak: float | None = None  # operations per second
        self.start()

    def start(self) -> None:
        """Training starts now."""
        self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

    def step(self) -> None:
        """A step was taken."""
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time in a `with` does not count."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def lap(self, waited: float) -> dict[str, float]:
        """What the log shows of the steps since the last lap, until which batches were waited for `waited` seconds in all.

        `images_per_s` of all processes; `step_s` and `data_wait_s` in seconds per step; `tflops` and `mfu`, the share of the
        device's measured peak, the latter after `PEAK_AFTER` seconds; `peak_memory` in bytes, of the device or on a CPU of
        the process.
        """
        now = time.monotonic()
        elapsed, steps, before = now - self._since, self._steps, self._waited
        self.seconds += elapsed
        self._steps, self._waited, self._since = 0, waited, now
        images_per_s = steps * self.samples_per_step / elapsed
        found = {"images_per_s": images_per_s, "step_s": elapsed / steps, "data_wait_s": (waited - before) / steps}
        if self.flops:
            found["tflops"] = images_per_s * self.flops / self.processes / 1e12
            if self._peak is None and self.seconds >= PEAK_AFTER:
                with self.paused():
                    self._peak = measured_peak(self.device, self.dtype)
            if self._peak is not None:
                found["mfu"] = found["tflops"] * 1e12 / self._peak
        return found | {"peak_memory": float(peak_memory(self.device))}


def peak_memory(device: torch.device) -> int:
    """The most bytes that torch had allocated on a GPU; on a CPU, the most resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows, where psutil tells the peak itself
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
