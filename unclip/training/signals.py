"""Signals that stop a run after the step that is under way."""

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal that does not wait for the step under way. Not an Exception: the compiler turns those into its own."""


class StopSignals:
    """Within a `with`, SIGTERM and SIGINT set `received` in place of ending the process.

    While `immediate` is true they raise Interrupted too: the first step of a compiled run may take minutes.
    """

    def __init__(self) -> None:
        self.received = self.immediate = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self.immediate:
            self.immediate = False
            raise Interrupted
