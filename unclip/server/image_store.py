"""Images that were requested by URL: in memory, under random names, for a limited time."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class ImageStore:
    """Up to `room` bytes of images, each for up to `seconds`; the oldest are evicted first."""

    def __init__(self, seconds: float = 3600, room: int = 128 * 2**20, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.room, self._clock = seconds, room, clock
        self._images: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, image: bytes) -> str:
        """Store an image and return its name: 256 random bits."""
        name = secrets.token_urlsafe(32)
        with self._lock:
            self._images[name] = (self._clock() + self.seconds, image)
            self._bytes += len(image)
            self._evict()
        return name

    def get(self, name: str) -> bytes | None:
        """The image of this name, or None if there is none any more."""
        with self._lock:
            self._evict()
            return self._images.get(name, (0, None))[1]

    def _evict(self) -> None:
        now = self._clock()
        while self._images:
            until, image = next(iter(self._images.values()))
            if until > now and self._bytes <= self.room:
                return
            self._images.popitem(last=False)
            self._bytes -= len(image)
