"""The speed of training, apart from validation, sampling and saving."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Counts steps and seconds of training; `seconds` is their total until the last `lap`."""

    def __init__(self, samples_per_step: int, seconds: float = 0.0):
        self.samples_per_step, self.seconds = samples_per_step, seconds
        self._steps, self._since = 0, time.monotonic()

    def start(self) -> None:
        """Training starts now."""
        self._steps, self._since = 0, time.monotonic()

    def step(self) -> None:
        """A step was taken."""
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time in a `with` does not count."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def lap(self) -> dict[str, float]:
        """What the log shows of the steps since the last lap: `images_per_s`."""
        now = time.monotonic()
        elapsed, steps = now - self._since, self._steps
        self.seconds += elapsed
        self._steps, self._since = 0, now
        return {"images_per_s": steps * self.samples_per_step / elapsed}
