"""Shared by the comparisons: candidates run in turn, so that noise affects all of them alike, and rows of a table.

Needs nothing but Python: a contestant's script may run in a virtual environment that has none of this package.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def in_turn(commands: Mapping[str, Sequence[str]], rounds: int, once: Sequence[str] = ()) -> dict[str, list[dict]]:
    """Answers of worker processes by name: each warms up with a first task, then they take turns (A B C A B C ...).

    `once` names those that do no more than warm up. A worker's last answer is what it says at its end.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen(list(command), **pipes) for name, command in commands.items()}
    answers = {name: [] for name in workers}
    try:
        for worker in workers.values():
            _ask(worker, "warm up")
        for number in range(rounds):
            for name, worker in workers.items():
                if name not in once:
                    answers[name].append(_ask(worker, "work"))
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, worker in workers.items():
            answers[name].append(_ask(worker, "end"))
            worker.wait()
    finally:
        for worker in workers.values():
            worker.kill()
    return answers


def serve(work: Callable[[], dict], end: Callable[[], dict] = dict) -> None:
    """A worker: answers each line of standard input with what `work` says, the last one with what `end` says."""
    for line in sys.stdin:
        last = line.strip() == "end"
        print(json.dumps(end() if last else work()), flush=True)
        if last:
            return


def spread(slow: Sequence[float], fast: Sequence[float]) -> str:
    """How many times as long, round by round: the median (and the range)."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def now(device: str) -> float:
    """Seconds, once `device` has done all that it was given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str = "cpu") -> str:
    """This machine in a line: its GPU, if that is the device; processor, cores, memory, what it multiplies quickly."""
    gpu = ""
    if device != "cpu":
        import torch

        gpu = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; "
    cpu, flags = platform.processor(), ""
    if Path("/proc/cpuinfo").is_file():
        facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        facts = {k.strip(): v.strip() for k, v in facts.items()}
        cpu, flags = facts.get("model name", cpu), facts.get("flags", "")
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{gpu}{cpu}, {cores} cores ({' '.join(fast)}), {memory:.0f} GB, Python {platform.python_version()}"


def _ask(worker: subprocess.Popen, what: str) -> dict:
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"{' '.join(map(str, worker.args))} ended with exit status {worker.wait()}")
    return json.loads(answer)
