"""What was drawn in each browser session, so that a page that is loaded again shows it again."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path

PICTURES = 48  # of one session
SESSIONS = 256  # that are remembered; beyond it, those that drew longest ago are forgotten

Drawn = tuple[str, str]  # a picture's file, and its caption


class Histories:
    """Files and captions by browser session, newest first, for as long as the files are there."""

    def __init__(self, pictures: int = PICTURES, sessions: int = SESSIONS):
        self.pictures, self.sessions = pictures, sessions
        self._drawn: OrderedDict[Hashable, list[Drawn]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: Hashable) -> list[Drawn]:
        with self._lock:
            return [(file, caption) for file, caption in self._drawn.get(session, ()) if Path(file).is_file()]

    def add(self, session: Hashable, drawn: Sequence[Drawn]) -> list[Drawn]:
        """-> the session's history with `drawn`, the last of them first."""
        with self._lock:
            self._drawn[session] = [*reversed(drawn), *self._drawn.get(session, ())][: self.pictures]
            self._drawn.move_to_end(session)
            while len(self._drawn) > self.sessions:
                self._drawn.popitem(last=False)
        return self.of(session)
