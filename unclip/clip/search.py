"""Image search by text or image: an index of the CLIP embeddings of a folder, stored on disk."""

# N images, D embedding dimension

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ..io.checkpoints import check_safetensors, save_tensors, write_beside
from ..io.images import SUFFIXES, open_image
from .model import CLIP

logger = logging.getLogger(__name__)

BATCH = 64


class Index:
    """Unit embeddings [N, D] of a folder's images with their paths, sizes and modification times.

    `update` embeds new and changed files and removes deleted ones; the folder itself is never written to. The index is a file
    in the user's cache, one for each folder and each CLIP.
    """

    def __init__(self, folder: str | Path, clip: CLIP, cache: str | Path | None = None):
        self.folder, self.clip = Path(folder).expanduser().resolve(), clip
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        name = hashlib.sha256(f"{self.folder}|{clip.fingerprint}".encode()).hexdigest()[:24]
        self.file = Path(cache or cache_folder()) / f"{name}.safetensors"
        self.stamps: dict[str, list[int]] = {}
        self.embeddings = torch.empty(0, clip.encode_text("").shape[1])
        if self.file.is_file():
            self._read()

    def _read(self) -> None:
        try:
            check_safetensors(self.file)
            with safe_open(self.file, "pt") as file:
                self.stamps = json.loads((file.metadata() or {})["stamps"])
                self.embeddings = file.get_tensor("embeddings")
        except (ValueError, KeyError) as error:
            logger.warning("the index %s is damaged and is rebuilt: %s", self.file, error)
            self.stamps, self.embeddings = {}, self.embeddings[:0]

    def update(self, progress: Callable[[Iterable[int]], Iterable[int]] = iter, rebuild: bool = False) -> list[str]:
        """Update the index, or `rebuild` it; -> the files that could not be read."""
        if rebuild:
            self.stamps, self.embeddings = {}, self.embeddings[:0]
        found: dict[str, list[int]] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                facts = path.stat()
                found[path.relative_to(self.folder).as_posix()] = [facts.st_size, facts.st_mtime_ns]
        rows = {name: n for n, name in enumerate(self.stamps)}
        current = [name for name, stamp in found.items() if self.stamps.get(name) == stamp]
        fresh = [name for name in found if name not in set(current)]
        if not fresh and len(current) == len(rows):
            return []
        stamps = {name: found[name] for name in current}
        parts = [self.embeddings[[rows[name] for name in current]]]
        unreadable = []
        for start in progress(range(0, len(fresh), BATCH)):
            images, names = [], []
            for name in fresh[start : start + BATCH]:
                try:
                    images.append(self.clip.preprocess(open_image(self.folder / name)))
                    names.append(name)
                except ValueError as error:
                    logger.warning("skipped: %s", error)
                    unreadable.append(name)
            if names:
                parts.append(self.clip.encode_pixels(torch.cat(images)).cpu())
                stamps |= {name: found[name] for name in names}
        self.stamps, self.embeddings = stamps, torch.cat(parts)
        self._write()
        return unreadable

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        tensors, stamps = {"embeddings": self.embeddings.contiguous()}, {"stamps": json.dumps(self.stamps)}
        write_beside(self.file, lambda path: save_tensors(tensors, path, stamps))

    def search(self, query: str | Image.Image, top: int = 10) -> list[tuple[float, str]]:
        """The `top` images nearest to a text or an image: (cosine, path within the folder), best first."""
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        if not self.stamps:
            return []
        wanted = self.clip.encode_text(query) if isinstance(query, str) else self.clip.encode_image(query)
        scores = self.embeddings @ wanted[0].cpu()
        best = scores.topk(min(top, len(scores)))
        names = list(self.stamps)
        return [(score, names[row]) for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def cache_folder() -> Path:
    """The folder of indices: `$XDG_CACHE_HOME/unclip/search`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "search"


TEMPLATES = ("{}", "a {}", "an emoji of {}", "a picture of {}")


def classify(clip: CLIP, image: Image.Image, labels: list[str]) -> list[tuple[float, str]]:
    """Zero-shot classification (CLIP, section 3.1.2): (cosine, label), best first.

    A label's direction is the mean of `TEMPLATES` filled with it (section 3.1.4).
    """
    if not labels or any(not label.strip() for label in labels):
        raise ValueError(f"labels must be words, got {labels!r}")
    directions: list[Tensor] = []
    for label in labels:
        directions.append(clip.encode_text([t.format(label) for t in TEMPLATES]).mean(0))
    texts = torch.nn.functional.normalize(torch.stack(directions), dim=-1)
    scores = (texts @ clip.encode_image(image)[0]).tolist()
    return sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])
