"""Training runs in this process and in others, stopped in the middle; and what they leave."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from forked import Process
from safetensors.torch import load_file
from torch import Tensor

from unclip.training.trainer import train

POSIX = hasattr(os, "fork")  # elsewhere a signal cannot be caught: it ends the process
QUIET = ("sample_every=0", "validate_every=0", "save_minutes=0", "log_every=1")


def run_here(stage: str, folder: Path, *settings: str, stop_at: int | None = None) -> Path:
    """Train `configs/tiny/{stage}.yaml` in this process; SIGTERM arrives as soon as the checkpoint `stop_at` is there."""
    if stop_at is not None:
        _need_posix()
    watching = threading.Event()

    def watch() -> None:
        while not (folder / f"checkpoint-{stop_at:08d}").is_dir() and not watching.wait(0.001):
            pass
        if not watching.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    if stop_at is not None:
        watcher.start()
    try:
        train(ROOT / f"configs/tiny/{stage}.yaml", [*QUIET, *settings, f"output_dir={folder}"])
    finally:
        watching.set()
        if stop_at is not None:
            watcher.join()
    return folder


def rows(run: Path, kind: str) -> list[dict]:
    """The rows of a run's log of one kind: "train", say."""
    return [row for line in (run / "log.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind]


def _need_posix() -> None:
    if not POSIX:
        pytest.skip("this system sends a process no signal that it could answer")


def start(stage: str, folder: Path, *settings: str, processes: int = 1) -> list[Process]:
    """The same, or a script in place of a stage, in processes of their own, that know of each other as torchrun's do."""
    script = [stage] if stage.endswith(".py") else ["train.py", f"configs/tiny/{stage}.yaml"]
    return launch([*script, *QUIET, *settings, f"output_dir={folder}"], processes)


def launch(command: list[str], processes: int) -> list[Process]:
    """A script or a module (`-m NAME`) with what it is told, in processes of their own."""
    _need_posix()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        more = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(Process(command, {k: str(v) for k, v in more.items()} if processes > 1 else {}))
    return started


def finish(processes: list[Process]) -> str:
    """Wait for all of them to end well; -> what the first said."""
    said = [process.said() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return said[0]


def kill(processes: list[Process], when: Callable[[], bool], delay: float = 0.0) -> None:
    """SIGKILL to all of them, `delay` seconds after `when` has come true."""
    deadline = time.monotonic() + 300
    while not when():
        assert time.monotonic() < deadline and all(p.returncode is None for p in processes), processes[0].said()
        time.sleep(0.0002)
    time.sleep(delay)
    for process in processes:
        process.kill()
    for process in processes:
        process.said()
        assert process.returncode == -signal.SIGKILL


def state(folder: Path) -> dict[str, Tensor]:
    """Weights, average (where there is one) and moments of a run's newest checkpoint."""
    newest = sorted(folder.glob("checkpoint-????????"))[-1]
    return {f"{path.stem}.{k}": v for path in newest.glob("*.safetensors") for k, v in load_file(path).items()}


def finals(folder: Path) -> dict[str, bytes]:
    """The files that a finished run leaves for a pipeline."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "final").rglob("*") if p.is_file()}
