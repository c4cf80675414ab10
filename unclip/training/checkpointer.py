"""The checkpoints of a run in its output folder, and the lock on that folder."""

import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from torch import Tensor

from ..io.checkpoints import checkpoints, load_checkpoint, remove_checkpoint, save_checkpoint, set_aside
from ..runtime.config import ConfigError
from .background import BackgroundWriter
from .distributed import Distributed

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint that was read: tensors by kind ("weights", "optimizer", "ema") and name, and plain values."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    origin: str  # which one it is, for messages


class Checkpointer:
    """Writes, finds and prunes the checkpoints in `folder`, of which the newest `keep` stay.

    A checkpoint is copied to the host, and written and hashed in the background.
    """

    def __init__(self, folder: Path, keep: int, distributed: Distributed):
        self.folder, self.keep, self.distributed = folder, keep, distributed
        self.saved_step: int | None = None  # of the newest checkpoint
        self._writer = BackgroundWriter()

    def is_finished(self, max_steps: int) -> bool:
        """Whether `final/` is there and of `max_steps`, or cannot be trained further because its checkpoints are gone."""
        if not (self.folder / "final").is_dir() or self._unfinished.is_file():
            return False
        newest = checkpoints(self.folder)[:1]
        return not newest or int(newest[0].name.rpartition("-")[2]) >= max_steps

    @property
    def _unfinished(self) -> Path:
        """A file that is there while a finished run is trained further: `final/` is that of fewer steps then."""
        return self.folder / ".unfinished"

    def begin(self) -> None:
        """Called with the folder locked: `final/`, if there is one, will be replaced."""
        if self.distributed.is_main and (self.folder / "final").is_dir():
            self._unfinished.touch()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder: concurrent runs would overwrite each other's checkpoints.

        The main process holds the lock, which ends with the process in whatever way; data workers do not inherit it. On a
        file system without locks there is none. Raises ConfigError that names the process which holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock, owner = FileLock(self.folder / ".lock"), None
        owner_file = self.folder / ".lock.owner"  # Windows lets nobody read a locked file
        if self.distributed.is_main:
            try:
                lock.acquire(timeout=0)
                owner_file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            except Timeout:
                owner = (owner_file.read_text(encoding="utf-8") if owner_file.is_file() else "") or "another process"
            except (OSError, NotImplementedError):
                logger.warning("%s is on a file system without locks: do not train in it twice at the same time", self.folder)
        try:
            if any(self.distributed.any(owner is not None)):
                if not self.distributed.is_main:
                    raise SystemExit(1)
                raise ConfigError(f"{self.folder} is being trained in by {owner}: stop that run, or choose another output_dir")
            yield
        finally:
            if lock.is_locked:
                owner_file.unlink(missing_ok=True)
                lock.release()

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:08d}"

    def last(self) -> str:
        """The newest checkpoint's folder, or "none"."""
        self._writer.join()
        found = checkpoints(self.folder)
        return str(found[0]) if found else "none"

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint that is undamaged: the main process looks for it, and all of them read it."""
        found, chosen = None, None
        for folder in checkpoints(self.folder) if self.distributed.is_main else []:
            try:
                found, chosen = load_checkpoint(folder), folder
                break
            except (ValueError, KeyError) as error:
                aside = set_aside(folder, "damaged").name
                self.distributed.report(f"skipping a damaged checkpoint, now {aside}: {error}")
        chosen = self.distributed.broadcast(chosen)
        if chosen is None:
            return None
        tensors, state = found or load_checkpoint(chosen)
        self.saved_step = state["step"]
        return Checkpoint(tensors, state, f"the checkpoint of step {state['step']} in {self.folder}")

    def save(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of `state["step"]` on the main process, and to prune; the one before is waited for.

        The tensors may change as soon as this returns. DiskFull of the one before ends every process.
        """
        self.wait()
        if self.distributed.is_main:
            copies = {
                kind: {name: v.detach().to("cpu", copy=True) for name, v in content.items()}
                for kind, content in tensors.items()
            }

            def write() -> None:
                save_checkpoint(self.path(state["step"]), copies, state)
                for old in checkpoints(self.folder)[self.keep :]:
                    remove_checkpoint(old)

            self._writer.start(write)
        self.saved_step = state["step"]

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. DiskFull ends every process."""
        self.distributed.run_on_main(self._writer.wait)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, on a way out that has an error of its own to tell."""
        self._writer.join()

    def write_components(self, name: str, write: Callable[[Path], None]) -> None:
        """Replace the folder `name` ("latest" or "final") by what `write` writes into the folder that it is given."""
        partial, target = self.folder / f"{name}.partial", self.folder / name

        def replace() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            write(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)

        self.distributed.run_on_main(replace)

    def finish(self) -> None:
        """Called when `final/` is written: remove `latest/`, which it replaces."""
        if self.distributed.is_main:
            shutil.rmtree(self.folder / "latest", ignore_errors=True)
            self._unfinished.unlink(missing_ok=True)

    def set_aside_suspect(self, step: int) -> str | None:
        """Rename the checkpoint of `step`, if it is the newest, so that no run resumes from it; -> its new name."""
        self._writer.join()
        if self.saved_step != step or not self.path(step).is_dir():
            return None
        return set_aside(self.path(step), "suspect").name
