"""Where pictures lie that were asked for by URL: in memory, under names that cannot be guessed, for a while."""

import secrets
import threading
import time
from collections import OrderedDict


class ImageStore:
    """Up to `room` bytes of pictures, each for up to `seconds`; where there is no room the oldest go first."""

    def __init__(self, seconds: float = 3600, room: int = 128 * 2**20, clock=time.monotonic):
        self.seconds, self.room, self._clock = seconds, room, clock
        self._pictures: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def put(self, picture: bytes) -> str:
        """-> the picture's name: 256 random bits."""
        name = secrets.token_urlsafe(32)
        with self._lock:
            self._pictures[name] = (self._clock() + self.seconds, picture)
            self._held += len(picture)
            self._tidy()
        return name

    def get(self, name: str) -> bytes | None:
        """A picture, or None where there is none of this name any more."""
        with self._lock:
            self._tidy()
            return self._pictures.get(name, (0, None))[1]

    def _tidy(self) -> None:
        now = self._clock()
        while self._pictures:
            until, picture = next(iter(self._pictures.values()))
            if until > now and self._held <= self.room:
                return
            self._pictures.popitem(last=False)
            self._held -= len(picture)
