"""API keys from a file, and rate limits."""

import hashlib
import hmac
import math
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

MIN_KEY = 16  # characters
MAX_CLIENTS = 10_000  # whose rate is kept


class Keys:
    """The keys of a file: one a line, optionally after a name; `#` begins a comment.

    Only their SHA-256 digests are kept. Raises ValueError, naming the line but never the key, for a file without keys
    and for keys that are too short, written twice or readable by everyone.
    """

    def __init__(self, file: str | Path):
        file = Path(file).expanduser()
        if not file.is_file():
            raise ValueError(f"there is no key file {file}")
        if os.name == "posix" and file.stat().st_mode & 0o004:
            raise ValueError(f"everyone on this machine can read the key file {file}: chmod 600 {file}")
        self._digests: dict[str, bytes] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) > 2:
                raise ValueError(f"{file}, line {number}: expected a key, or a name and a key, got {len(words)} words")
            name, key = words if len(words) == 2 else (f"key-{number}", words[0])
            if not re.fullmatch(r"[\w.-]{1,64}", name):
                raise ValueError(f"{file}, line {number}: a name has up to 64 letters, digits, dots and dashes")
            if len(key) < MIN_KEY or not key.isascii():
                raise ValueError(f"{file}, line {number}: a key has at least {MIN_KEY} ASCII characters, got {len(key)}")
            if name in self._digests or _digest(key) in self._digests.values():
                raise ValueError(f"{file}, line {number}: this key, or its name, is there twice")
            self._digests[name] = _digest(key)
        if not self._digests:
            raise ValueError(f"the key file {file} holds no key")

    def matches(self, name: str, key: str) -> bool:
        """Whether `key` is the one of this name."""
        return self.owner(key) == name

    def owner(self, key: str) -> str | None:
        """The name of a key, None for a wrong one; takes the same time for every key, right or wrong."""
        given, found = _digest(key), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Rate:
    """At most `per_minute` images a minute for each client, also all at once."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        if per_minute < 1:
            raise ValueError(f"the rate must be at least 1 image a minute, got {per_minute}")
        self.per_minute, self._clock = per_minute, clock
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}  # client: images left, as of when

    def message(self, wait: int, images: int) -> str:
        """The error message for a client that has to wait, or that requests more than the rate allows at once."""
        if images > self.per_minute:
            return f"{images} images are more than the {self.per_minute} a minute that you may ask for: ask for fewer at once."
        return f"Rate limit reached: {self.per_minute} images a minute. Try again in {wait} s."

    def take(self, client: str, images: int) -> int:
        """Count `images` and return 0, or return the seconds to wait and count nothing."""
        with self._lock:
            now = self._clock()
            left, then = self._left.get(client, (self.per_minute, now))
            left = min(left + (now - then) * self.per_minute / 60, self.per_minute)
            if images > left:
                return max(math.ceil((min(images, self.per_minute) - left) * 60 / self.per_minute), 1)
            self._left[client] = (left - images, now)
            if len(self._left) > MAX_CLIENTS:
                full = 60 * (1 - 1 / self.per_minute)
                self._left = {c: v for c, v in self._left.items() if now - v[1] < full}
            return 0

    def refund(self, client: str, images: int) -> None:
        """Undo `take` of images that were refused later."""
        with self._lock:
            if client in self._left:
                left, then = self._left[client]
                self._left[client] = (min(left + images, self.per_minute), then)
