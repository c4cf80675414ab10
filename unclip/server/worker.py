"""Runs one model for many clients: a bounded queue, fair between clients, that batches jobs of equal work."""

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol

logger = logging.getLogger(__name__)

BATCH_WAIT = 0.02  # seconds that an idle model waits after the first job, to batch it with others


class Work(Protocol):
    """How jobs are run; up to `batch` jobs of equal works may be run together."""

    @property
    def name(self) -> str:
        """The operation, for metrics."""

    @property
    def batch(self) -> int:
        """The largest batch."""

    def run(self, jobs: list[Any], is_wanted: Callable[[], bool]) -> list[Any]:
        """One answer for each job, in order; may stop early once `is_wanted()` is false."""


class Busy(Exception):
    """The queue is full; `retry_after` estimates in how many seconds it is not."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, eq=False)
class FunctionWork:
    """Work that is never batched: a job is a function of `is_wanted`."""

    name: str
    batch: int = 1

    def run(self, jobs: list[Callable[[Callable[[], bool]], Any]], is_wanted: Callable[[], bool]) -> list[Any]:
        return [job(is_wanted) for job in jobs]


@dataclass(eq=False)
class _QueuedJob:
    client: str
    work: Work
    job: Any
    answer: Future = field(default_factory=Future)


class Worker:
    """The thread that runs a model.

    Clients take turns, job by job. A batch begins with the job whose turn it is and adds jobs of equal work, turn by turn;
    clients without such a job are skipped and come first in the next batch. At most `limit` jobs wait, at most half of them
    of one client. Cancelling a job's future removes it from the queue, and stops a batch after its current step if no other
    job of it is wanted. `on_batch(work, jobs, seconds)` is called after every batch.
    """

    def __init__(self, limit: int = 64, on_batch: Callable[[Work, int, float], None] | None = None):
        if limit < 2:
            raise ValueError(f"the queue must have room for at least 2 jobs, got {limit}")
        self.limit, self.on_batch = limit, on_batch
        self._clients: OrderedDict[str, deque[_QueuedJob]] = OrderedDict()  # the next client first
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False
        self._pace = 1.0  # moving average of seconds a job
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue, without those that are running."""
        with self._changed:
            return self._count()

    @property
    def running(self) -> int:
        """Jobs in the batch that is running."""
        return self._running

    @property
    def alive(self) -> bool:
        """Whether jobs are accepted."""
        return self._thread.is_alive() and not self._closed

    def submit(self, client: str, work: Work, jobs: list[Any]) -> list[Future]:
        """Queue all of `jobs`, or none. Raises Busy if the queue, or this client's half of it, is full."""
        with self._changed:
            if self._closed:
                raise Busy("shutting down", 5)
            waiting, own = self._count(), len(self._clients.get(client, ()))
            if waiting + len(jobs) > self.limit or own + len(jobs) > max(self.limit // 2, 1):
                whose = "the queue is full" if waiting + len(jobs) > self.limit else "too many of your images are waiting"
                seconds = (waiting + self._running) * self._pace
                raise Busy(f"{whose} ({waiting} of {self.limit} places are taken)", min(max(math.ceil(seconds), 1), 600))
            places = [_QueuedJob(client, work, job) for job in jobs]
            self._clients.setdefault(client, deque()).extend(places)
            self._changed.notify()
        answers = [place.answer for place in places]
        for answer in answers:  # the callback must not hold the future: a reference cycle would keep its images in memory
            answer.add_done_callback(lambda answer: self._remove(client, answer))
        return answers

    def count_waiting(self, answers: list[Future]) -> int:
        """The number of these that are still in the queue."""
        with self._changed:
            return sum(place.answer is answer for places in self._clients.values() for place in places for answer in answers)

    def close(self, timeout: float | None = None) -> None:
        """Accept no more jobs, finish the queue, and end; after `timeout` seconds the remaining jobs are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            left = [place for places in self._clients.values() for place in places]
        for place in left:
            place.answer.cancel()

    def _count(self) -> int:
        return sum(map(len, self._clients.values()))

    def _remove(self, client: str, answer: Future) -> None:
        """Remove a cancelled job from the queue."""
        with self._changed:
            places = self._clients.get(client, deque())
            dropped = next((place for place in places if place.answer is answer), None)
            if dropped is not None:
                places.remove(dropped)
                if not places:
                    del self._clients[client]

    def _next_batch(self) -> list[_QueuedJob]:
        """The next batch; empty once the worker is closed and nothing waits."""
        with self._changed:
            if not self._clients and not self._closed:
                self._changed.wait_for(lambda: self._clients or self._closed)
                self._changed.wait_for(lambda: self._closed, timeout=BATCH_WAIT)
            batch: list[_QueuedJob] = []
            work = None
            skipped: dict[str, None] = {}  # since the last job that was added
            all_skipped: dict[str, None] = {}
            while self._clients and len(skipped) < len(self._clients):
                client, places = next(iter(self._clients.items()))
                work = places[0].work if work is None else work
                place = next((p for p in places if p.work == work), None)
                if place is None:
                    skipped[client] = all_skipped[client] = None
                else:
                    skipped.clear()
                    places.remove(place)
                    batch.append(place)
                self._clients.move_to_end(client)  # the next one's turn
                if not places:
                    del self._clients[client]
                if len(batch) >= work.batch:
                    break
            for client in reversed(all_skipped):
                self._clients.move_to_end(client, last=False)
            self._running = len(batch)
            return batch

    def _run(self) -> None:
        while True:
            batch = self._next_batch()
            if batch:
                self._run_batch(batch)
                self._running = 0
                del batch  # frees its images while idle
            elif self._closed:
                return

    def _run_batch(self, batch: list[_QueuedJob]) -> None:
        started = time.monotonic()
        try:
            answers = batch[0].work.run([p.job for p in batch], lambda: any(not p.answer.cancelled() for p in batch))
        except Exception as error:
            if len(batch) > 1:  # so that one job's error does not fail the others
                for place in batch:
                    if not place.answer.cancelled():
                        self._run_batch([place])
                return
            _settle(batch[0].answer.set_exception, error)
            return
        seconds = time.monotonic() - started
        self._pace += 0.2 * (seconds / len(batch) - self._pace)
        for place, answer in zip(batch, answers, strict=False):  # an interrupted call may answer with less
            _settle(place.answer.set_result, answer)
        if self.on_batch is not None:
            self.on_batch(batch[0].work, len(batch), seconds)


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    try:
        settle(value)
    except InvalidStateError:
        logger.debug("this job was cancelled")
