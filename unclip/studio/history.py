"""The images of each browser session, so that a reloaded page shows them again."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path

IMAGES = 48  # of one session
SESSIONS = 256  # that are kept; the least recently used are dropped

HistoryItem = tuple[str, str]  # an image's file, and its caption


class SessionHistories:
    """Files and captions by browser session, newest first, as long as the files exist.

    A session has one page after another (reloads of a tab); a page of no known session is a session of its own.
    """

    def __init__(self, images: int = IMAGES, sessions: int = SESSIONS):
        self.images, self.sessions = images, sessions
        self._items: OrderedDict[Hashable, list[HistoryItem]] = OrderedDict()
        self._session_of: OrderedDict[str, Hashable] = OrderedDict()  # by page
        self._lock = threading.Lock()

    def open(self, page: str, session: Hashable) -> list[HistoryItem]:
        """Assign a page, with its images so far, to `session`. Returns the session's history."""
        with self._lock:
            self._session_of[page] = session
            _trim(self._session_of, self.sessions)
            before = self._items.pop(page, [])
            if before:
                self._put(session, before)
        return self.of(page)

    def close(self, page: str) -> None:
        with self._lock:
            self._session_of.pop(page, None)

    def of(self, page: str) -> list[HistoryItem]:
        with self._lock:
            found = self._items.get(self._session_of.get(page, page), ())
            return [(file, caption) for file, caption in found if Path(file).is_file()]

    def add(self, page: str, items: Sequence[HistoryItem]) -> list[HistoryItem]:
        """Add `items`, the newest last. Returns the history of the page's session."""
        with self._lock:
            self._put(self._session_of.get(page, page), items[::-1])
        return self.of(page)

    def _put(self, session: Hashable, newest: Sequence[HistoryItem]) -> None:
        self._items[session] = [*newest, *self._items.get(session, ())][: self.images]
        self._items.move_to_end(session)
        _trim(self._items, self.sessions)


def _trim(items: OrderedDict, count: int) -> None:
    while len(items) > count:
        items.popitem(last=False)
