"""Work that is done in the background of the training loop."""

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs one action at a time in a thread of its own. Python's exit waits for it; a kill does not."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, action: Callable[[], None]) -> None:
        """Run `action`. The one before must have been waited for."""

        def run() -> None:
            try:
                action()
            except BaseException as error:  # raised where it is waited for
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait until the action has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until the action has ended, and raise what it raised."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
