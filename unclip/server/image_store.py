"""Where images lie that were asked for by URL: in memory, under names that cannot be guessed, for a while."""

import secrets
import threading
import time
from collections import OrderedDict


class ImageStore:
    """Up to `room` bytes of images, each for up to `seconds`; where there is no room the oldest go first."""

    def __init__(self, seconds: float = 3600, room: int = 128 * 2**20, clock=time.monotonic):
        self.seconds, self.room, self._clock = seconds, room, clock
        self._images: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def put(self, image: bytes) -> str:
        """-> the image's name: 256 random bits."""
        name = secrets.token_urlsafe(32)
        with self._lock:
            self._images[name] = (self._clock() + self.seconds, image)
            self._held += len(image)
            self._tidy()
        return name

    def get(self, name: str) -> bytes | None:
        """An image, or None where there is none of this name any more."""
        with self._lock:
            self._tidy()
            return self._images.get(name, (0, None))[1]

    def _tidy(self) -> None:
        now = self._clock()
        while self._images:
            until, image = next(iter(self._images.values()))
            if until > now and self._held <= self.room:
                return
            self._images.popitem(last=False)
            self._held -= len(image)
