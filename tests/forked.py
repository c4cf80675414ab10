"""Processes of their own that need not import the package first. Imports little itself: each of them imports it."""

import os
import runpy
import signal
import sys
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import NamedTemporaryFile

ROOT = Path(__file__).parents[1]


class Process:
    """A script at the root of the clone, or a module (`-m NAME`), with what it is told.

    It is forked from a process that has imported what takes longer than a tiny run does.
    """

    _spawn = get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        _spawn.set_forkserver_preload(["unclip.training.trainer", "unclip.pipelines"])

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._answered, self._said = NamedTemporaryFile(), NamedTemporaryFile()  # noqa: SIM115
        given = (command, environment, self._answered.name, self._said.name)
        self._process = self._spawn.Process(target=_run_script, args=given)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def said(self, timeout: float = 600) -> str:
        """What it wrote to stderr, once it has ended."""
        self._process.join(timeout)
        written = Path(self._said.name).read_text()
        assert self.returncode is not None, f"still running after {timeout} s: {written}"
        return written

    def answered(self) -> str:
        """And to stdout."""
        return Path(self._answered.name).read_text()


def _run_script(command: list[str], environment: dict[str, str], answered: str, said: str) -> None:
    set_start_method(None, force=True)  # what it starts itself, it starts as any process does
    for number, file in ((1, answered), (2, said)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ |= environment
    sys.path[0] = str(ROOT)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
