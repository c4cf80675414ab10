"""What was drawn in each browser session, so that a page that is loaded again shows it again."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path

IMAGES = 48  # of one session
SESSIONS = 256  # that are remembered; beyond it, those that drew longest ago are forgotten

Drawn = tuple[str, str]  # an image's file, and its caption


class Histories:
    """Files and captions by browser session, newest first, for as long as the files are there.

    A session has one open page after another (the same tab, loaded again); a page of no known session is one of its own.
    """

    def __init__(self, images: int = IMAGES, sessions: int = SESSIONS):
        self.images, self.sessions = images, sessions
        self._drawn: OrderedDict[Hashable, list[Drawn]] = OrderedDict()
        self._session_of: OrderedDict[str, Hashable] = OrderedDict()  # by page
        self._lock = threading.Lock()

    def open(self, page: str, session: Hashable) -> list[Drawn]:
        """Take a page as one of `session`, with what it has drawn already; -> the session's history."""
        with self._lock:
            self._session_of[page] = session
            _bound(self._session_of, self.sessions)
            before = self._drawn.pop(page, [])
            if before:
                self._put(session, before)
        return self.of(page)

    def close(self, page: str) -> None:
        with self._lock:
            self._session_of.pop(page, None)

    def of(self, page: str) -> list[Drawn]:
        with self._lock:
            found = self._drawn.get(self._session_of.get(page, page), ())
            return [(file, caption) for file, caption in found if Path(file).is_file()]

    def add(self, page: str, drawn: Sequence[Drawn]) -> list[Drawn]:
        """-> the history of the page's session with `drawn`, the last of them first."""
        with self._lock:
            self._put(self._session_of.get(page, page), drawn[::-1])
        return self.of(page)

    def _put(self, session: Hashable, newest: Sequence[Drawn]) -> None:
        self._drawn[session] = [*newest, *self._drawn.get(session, ())][: self.images]
        self._drawn.move_to_end(session)
        _bound(self._drawn, self.sessions)


def _bound(kept: OrderedDict, count: int) -> None:
    while len(kept) > count:
        kept.popitem(last=False)
