"""The batches of a run: which examples each process trains on, and the workers that make them."""

import re
import signal
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from .config import TrainConfig

PREFETCHED = 4  # batches that a data worker makes ahead


class GlobalBatches(Sampler[list[int]]):
    """Indices of one process's batches: step `s` uses the same examples with any number of processes and accumulated passes."""

    def __init__(self, config: TrainConfig, first_step: int, rank: int, processes: int):
        self.config, self.first_step, self.rank, self.processes = config, first_step, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        size = self.config.batch_size
        parts = self.config.gradient_accumulation * self.processes
        for step in range(self.first_step, self.config.max_steps):
            for part in range(self.config.gradient_accumulation):
                start = (step * parts + part * self.processes + self.rank) * size
                yield list(range(start, start + size))

    def __len__(self) -> int:
        return (self.config.max_steps - self.first_step) * self.config.gradient_accumulation


class TrainingBatches:
    """Iterator over collated batches; leaving its `with` ends the data workers.

    `waited` is the time in seconds for which batches were waited for.
    """

    def __init__(self, examples: Dataset[Any], batches: GlobalBatches):
        workers = batches.config.workers
        loader: DataLoader[Any] = DataLoader(
            examples,
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            worker_init_fn=_ignore_signals,
        )
        self._iterator: Iterator[dict[str, Any]] | None = iter(loader)
        self.waited = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch. Raises a data worker's ValueError with its message alone, without the worker's traceback."""
        if self._iterator is None:
            raise StopIteration
        started = time.perf_counter()
        try:
            return next(self._iterator)
        except ValueError as error:
            if not str(error).startswith("Caught "):
                raise
            traceback.clear_frames(error.__traceback__)  # torch's frame refers to the exception: a cycle that keeps workers
            kind = type(error)
            message = re.split(rf"^[\w.]*{kind.__name__}: ", str(error), flags=re.MULTILINE)[-1]
        finally:
            self.waited += time.perf_counter() - started
        raise kind(message.strip())  # outside of `except`: its context would keep the data workers alive

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the data workers.

        torch ends them when nothing refers to their iterator. The frames of an error's traceback do, and Python's exit would
        then wait forever for workers that ignore signals.
        """
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        self._iterator = None


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group is for the main process, which saves and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
