"""One model, many who ask: a bounded queue, fair between clients, whose jobs are drawn together where they can be."""

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

LINGER = 0.02  # seconds that an idle model waits after the first job, for those that come with it


class Work(Protocol):
    """How jobs are drawn; jobs of equal works may be drawn together, up to `batch` of them."""

    batch: int

    def draw(self, jobs: list[Any], wanted: Callable[[], bool]) -> list[Any]:
        """One answer for each job, in order; may stop early once nobody waits any more (`wanted()` is false)."""


class Busy(Exception):
    """There is no room in the queue; `retry_after` says in how many seconds there may be."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, eq=False)
class Calling:
    """Work of no fixed kind, never drawn together: a job is a function of `wanted`."""

    name: str
    batch: int = 1

    def draw(self, jobs: list[Callable[[Callable[[], bool]], Any]], wanted: Callable[[], bool]) -> list[Any]:
        return [job(wanted) for job in jobs]


@dataclass(eq=False)
class _Place:
    client: str
    work: Work
    job: Any
    answer: Future = field(default_factory=Future)


class Worker:
    """The one thread that runs a model.

    Clients take turns, job by job; a batch begins with the job whose turn it is and takes in, turn by turn, what equals
    its work; who has nothing of that kind is passed over and has the next turn. At most `limit` jobs wait, and at most half
    of them one client's. To drop a job, cancel its future: it leaves the queue at once, and a batch that nobody waits for
    any more stops after its step. `on_batch(work, jobs, seconds)` hears of every batch.
    """

    def __init__(self, limit: int = 64, on_batch: Callable[[Work, int, float], None] | None = None):
        if limit < 2:
            raise ValueError(f"the queue must have room for at least 2 jobs, got {limit}")
        self.limit, self.on_batch = limit, on_batch
        self._clients: OrderedDict[str, deque[_Place]] = OrderedDict()  # the one whose turn it is first
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False
        self._pace = 1.0  # seconds a job, lately
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue, those that are being drawn not among them."""
        with self._changed:
            return self._count()

    @property
    def running(self) -> int:
        """Jobs in the batch that is being drawn."""
        return self._running

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._closed

    def submit(self, client: str, work: Work, jobs: list[Any]) -> list[Future]:
        """Queue all of `jobs`, or none. Raises Busy where the queue, or this client's half of it, has no room."""
        with self._changed:
            if self._closed:
                raise Busy("shutting down", 5)
            waiting, own = self._count(), len(self._clients.get(client, ()))
            if waiting + len(jobs) > self.limit or own + len(jobs) > max(self.limit // 2, 1):
                whose = "the queue is full" if waiting + len(jobs) > self.limit else "too many of your images are waiting"
                seconds = (waiting + self._running) * self._pace
                raise Busy(f"{whose} ({waiting} of {self.limit} places are taken)", min(max(math.ceil(seconds), 1), 600))
            places = [_Place(client, work, job) for job in jobs]
            self._clients.setdefault(client, deque()).extend(places)
            self._changed.notify()
        answers = [place.answer for place in places]
        for answer in answers:  # what it calls must not hold it: images in a cycle stay until Python looks for cycles
            answer.add_done_callback(lambda answer: self._forget(client, answer))
        return answers

    def still_wait(self, answers: list[Future]) -> int:
        """How many of these are still in the queue."""
        with self._changed:
            return sum(place.answer is answer for places in self._clients.values() for place in places for answer in answers)

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more, draw what waits, and end; what is not done after `timeout` seconds is dropped."""
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

    def _forget(self, client: str, answer: Future) -> None:
        """Give a dropped job's place free."""
        with self._changed:
            places = self._clients.get(client, ())
            dropped = next((place for place in places if place.answer is answer), None)
            if dropped is not None:
                places.remove(dropped)
                if not places:
                    del self._clients[client]

    def _take(self) -> list[_Place]:
        """The next batch; empty once the worker is closed and nothing waits."""
        with self._changed:
            if not self._clients and not self._closed:
                self._changed.wait_for(lambda: self._clients or self._closed)
                self._changed.wait_for(lambda: self._closed, timeout=LINGER)
            batch: list[_Place] = []
            work = None
            passed: dict[str, None] = {}  # clients in a row that had nothing to add
            owed: dict[str, None] = {}  # all those
            while self._clients and len(passed) < len(self._clients):
                client, places = next(iter(self._clients.items()))
                work = places[0].work if work is None else work
                place = next((p for p in places if p.work == work), None)
                if place is None:
                    passed[client] = owed[client] = None
                else:
                    passed.clear()
                    places.remove(place)
                    batch.append(place)
                self._clients.move_to_end(client)  # the next one's turn
                if not places:
                    del self._clients[client]
                if len(batch) >= work.batch:
                    break
            for client in reversed(owed):
                self._clients.move_to_end(client, last=False)
            self._running = len(batch)
            return batch

    def _run(self) -> None:
        while True:
            batch = self._take()
            if batch:
                self._draw(batch)
                self._running = 0
                del batch  # not held while there is nothing to do
            elif self._closed:
                return

    def _draw(self, batch: list[_Place]) -> None:
        started = time.monotonic()
        try:
            answers = batch[0].work.draw([p.job for p in batch], lambda: any(not p.answer.cancelled() for p in batch))
        except Exception as error:
            if len(batch) > 1:  # one client's trouble is not its neighbours'
                for place in batch:
                    if not place.answer.cancelled():
                        self._draw([place])
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
        logger.debug("nobody waits for this answer any more")
