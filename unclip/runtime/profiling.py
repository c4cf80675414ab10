"""Time, memory and operations of a pipeline's stages, and the peak rate of the machine."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

INTERVAL = 0.002  # seconds between two samples of a process's memory


@dataclass
class Cost:
    """The cost of one stage: wall time in seconds, peak memory in bytes, floating-point operations (0 if not counted).

    On a CUDA device the memory is torch's allocated memory, else the process's resident memory, including what it had
    before.
    """

    stage: str
    seconds: float = 0.0
    memory: int = 0
    flops: int = 0


class Profiled(Protocol):
    """A pipeline whose stages can be profiled."""

    _profile: "Profile | None"


class Profile:
    """The costs of a pipeline's stages while `watch` is open; a stage that runs twice is one entry.

    Counting slows small operations down: count and time in two runs.
    """

    def __init__(self, device: torch.device | str = "cpu", count: bool = False):
        self.device, self.count = torch.device(device), count
        self.costs: dict[str, Cost] = {}

    @contextmanager
    def watch(self, pipe: Profiled) -> Iterator["Profile"]:
        """Measure the stages that `pipe` runs in this context."""
        pipe._profile = self
        try:
            yield self
        finally:
            pipe._profile = None

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add the cost of this context to `stage`."""
        cost = self.costs.setdefault(stage, Cost(stage))
        counter = flop_counter() if self.count else None
        with peak_memory(self.device) as peak, counter or nullcontext():
            start = time.perf_counter()
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            cost.seconds += time.perf_counter() - start
        cost.memory = max(cost.memory, peak[0])
        cost.flops += counter.get_total_flops() if counter else 0


def flop_counter() -> FlopCounterMode:
    """Counts operations, including two kinds that torch does not: attention and packed linear layers on a CPU."""
    aten = torch.ops.aten
    found: dict[Callable[..., object], Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
            g, q, k, v
        ),
    }
    if torch.backends.mkldnn.is_available():
        found[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]
    return FlopCounterMode(display=False, custom_mapping=found)


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[list[int]]:
    """Yields a list whose only entry is, afterwards, the peak memory in bytes (see `Cost`)."""
    device, peak = torch.device(device), [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(os.getpid()), threading.Event()

    def sample() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            if done.wait(INTERVAL):
                return

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], process.memory_info().rss)


def measured_peak(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The most floating-point operations a second that a device reaches on a large convolution or matrix product.

    The convolution is 3x3 over 256 channels in channels_last; each is run five times and the fastest counts. Takes about
    a second.
    """
    device = torch.device(device)
    batch = 64 if device.type == "cuda" else 2
    x = torch.ones(batch, 256, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.ones(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    works = (
        (lambda: F.conv2d(x, kernel, padding=1), 2 * 9 * 256 * 256 * batch * 64 * 64),
        (lambda: matrix @ matrix, 2 * side**3),
    )
    return max(flops / fastest(work, device) for work, flops in works)


@torch.no_grad()
def fastest(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Seconds of the fastest of `times` runs, after one that doesn't count."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def table(timed: Profile, counted: Profile, peak: float) -> str:
    """One line for each stage: seconds and peak memory of one run, operations of another, and the share of `peak` (FLOP/s)."""
    costs = [Cost(n, c.seconds, c.memory, counted.costs[n].flops) for n, c in timed.costs.items()]
    total = Cost("all", sum(c.seconds for c in costs), max(c.memory for c in costs), sum(c.flops for c in costs))
    lines = [f"{'stage':<16}{'seconds':>9}{'peak MB':>9}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}"]
    for cost in (*costs, total):
        giga, rate = cost.flops / 1e9, cost.flops / cost.seconds
        lines.append(
            f"{cost.stage:<16}{cost.seconds:>9.3f}{cost.memory / 1e6:>9.0f}{giga:>9.2f}{rate / 1e9:>9.1f}{rate / peak:>9.0%}"
        )
    return "\n".join(lines)
