"""The queue before the model: what is drawn together, in whose turn, and what is dropped."""

import gc
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.server.worker import Busy, Worker


@dataclass(frozen=True)
class Echo:
    """Answers jobs with themselves, once `gate` is open; remembers its batches."""

    kind: str = "a"
    batch: int = 4
    gate: Any = field(default_factory=threading.Event, compare=False)
    entered: Any = field(default_factory=threading.Event, compare=False)
    seen: list = field(default_factory=list, compare=False)

    def run(self, jobs, is_wanted):
        self.seen.append(jobs)
        self.entered.set()
        while not self.gate.wait(0.005):
            if not is_wanted():
                return []
        if "bad" in jobs:
            raise ValueError("a bad job")
        return jobs


@pytest.fixture
def worker():
    worker = Worker(limit=16)
    yield worker
    worker.close(5)


def held(worker, work=None):
    """The model, busy with a job of its own until the gate of the returned work opens."""
    work = work or Echo("holding")
    (answer,) = worker.submit("somebody", work, ["held"])
    assert work.entered.wait(5)
    return work, answer


@dataclass(frozen=True)
class Making:
    """Answers each job with something new, and keeps nothing."""

    batch: int = 4

    def run(self, jobs, is_wanted):
        return [Counter() for _ in jobs]


def test_images_are_freed_as_soon_as_nobody_wants_them(worker):
    """Not when Python next looks for cycles: with a model's objects around, that may be thousands of requests later."""
    gc.disable()
    try:
        answers = worker.submit("me", Making(), [1, 2])
        images = [weakref.ref(answer.result(5)) for answer in answers]
        worker.submit("me", Making(), [3])[0].result(5)
        del answers
        assert [image() for image in images] == [None, None]
    finally:
        gc.enable()


def test_what_waits_together_is_drawn_together_and_no_more_than_fits(worker):
    holding, first = held(worker)
    work = Echo(gate=holding.gate)
    answers = [a for client in "xyz" for a in worker.submit(client, work, [f"{client}1", f"{client}2"])]
    holding.gate.set()
    assert [a.result(5) for a in answers] == ["x1", "x2", "y1", "y2", "z1", "z2"] and first.result(5) == "held"
    assert work.seen == [["x1", "y1", "z1", "x2"], ["y2", "z2"]]


def test_clients_take_turns_and_other_work_waits_for_its_own(worker):
    holding, _ = held(worker)
    work, other = Echo(batch=2, gate=holding.gate), Echo("b", gate=holding.gate)
    many = worker.submit("many", work, [f"m{n}" for n in range(6)])
    lone = worker.submit("lone", other, ["l1"])
    late = worker.submit("late", work, ["t1"])
    holding.gate.set()
    for answer in [*many, *lone, *late]:
        answer.result(5)
    assert work.seen[0] == ["m0", "t1"], "six jobs that were there first do not keep the late one waiting"
    assert other.seen == [["l1"]]


def test_nobody_is_passed_over_twice(worker):
    """Two clients who ask for the same fill the batches for as long as they like; what another asks for is drawn next."""
    holding, _ = held(worker)
    order = []

    @dataclass(frozen=True)
    class Noting(Echo):
        def run(self, jobs, is_wanted):
            order.append(jobs)
            return jobs

    same, other = Noting("same"), Noting("other")
    waiting = [("c", same, "c"), ("b", other, "b"), ("a", same, "a")]
    answers = [a for client, work, name in waiting for a in worker.submit(client, work, [name] * (1 if name == "b" else 5))]
    holding.gate.set()
    for answer in answers:
        answer.result(5)
    assert order == [["c", "a", "c", "a"], ["b"], ["c", "a", "c", "a"], ["c", "a"]]


def test_the_bound_refuses_all_or_nothing_and_says_when_to_come_back(worker):
    holding, _ = held(worker)
    work = Echo(gate=holding.gate)
    first = worker.submit("a", work, list(range(8)))
    with pytest.raises(Busy, match="too many of your") as busy:
        worker.submit("a", work, [8])
    assert busy.value.retry_after >= 1 and worker.waiting == 8
    second = worker.submit("b", work, list(range(6)))
    with pytest.raises(Busy, match="14 of 16 places"):
        worker.submit("c", work, list(range(3)))
    assert worker.waiting == 14
    assert len(worker.submit("c", work, [1, 2])) == 2
    holding.gate.set()
    assert [a.result(5) for a in [*first, *second]] == [*range(8), *range(6)]


def test_a_dropped_job_frees_its_place_and_stops_a_batch_that_nobody_waits_for(worker):
    _, running = held(worker)
    work = Echo(gate=threading.Event())
    dropped = worker.submit("a", work, ["gone", "gone too"])
    (kept,) = worker.submit("b", work, ["kept"])
    assert [a.cancel() for a in dropped] == [True, True] and worker.waiting == 1
    running.cancel()  # its gate stays closed: only being dropped ends it
    assert work.entered.wait(5)
    work.gate.set()
    assert kept.result(5) == "kept" and work.seen == [["kept"]]


def test_one_jobs_failure_is_not_its_neighbours(worker):
    holding, _ = held(worker)
    work = Echo(gate=holding.gate)
    good, bad, fine = worker.submit("a", work, ["good", "bad", "fine"])
    holding.gate.set()
    assert good.result(5) == "good" and fine.result(5) == "fine"
    with pytest.raises(ValueError, match="a bad job"):
        bad.result(5)


def test_closing_draws_what_waits_and_takes_nothing_more(worker):
    holding, first = held(worker)
    work = Echo(gate=holding.gate)
    answers = worker.submit("a", work, [1, 2, 3])
    closing = threading.Thread(target=worker.close)
    closing.start()
    while worker.alive:
        time.sleep(0.001)
    with pytest.raises(Busy, match="shutting down"):
        worker.submit("a", work, [4])
    holding.gate.set()
    closing.join(5)
    assert not closing.is_alive() and [a.result(0) for a in answers] == [1, 2, 3] and first.result(0) == "held"


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(1, 4), st.booleans()), max_size=12))
def test_every_job_is_answered_or_dropped_exactly_once(requests):
    worker = Worker(limit=64)
    holding, _ = held(worker)
    works = {kind: Echo(kind, gate=holding.gate) for kind in "xy"}
    kept, dropped = [], 0
    for number, (client, kind, count, drop) in enumerate(requests):
        answers = worker.submit(client, works[kind], [(client, kind, number, n) for n in range(count)])
        if drop:
            dropped += sum(a.cancel() for a in answers)
        else:
            kept += [(answer, (client, kind, number, n)) for n, answer in enumerate(answers)]
    holding.gate.set()
    worker.close(5)
    assert all(answer.result(0) == job for answer, job in kept)
    drawn = Counter(job for work in works.values() for jobs in work.seen for job in jobs)
    assert drawn == Counter(job for _, job in kept), "nothing dropped is drawn, nothing is drawn twice"
    assert all(len(jobs) <= 4 for work in works.values() for jobs in work.seen)
