"""One's own captioned pictures: a folder with metadata.jsonl, metadata.csv or a .txt beside each picture, or parquet."""

# S side of a picture in pixels

import csv
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..images import SUFFIXES, open_image, square

logger = logging.getLogger(__name__)

HELD_OUT = 0.05  # the share of the pictures that is kept for validation, by a hash of their names


@dataclass
class Captioned:
    """Names and captions of pictures, and how to open the one at a row; `source` is the file or its bytes."""

    names: list[str]
    captions: list[str]
    source: Callable[[int], Path | io.BytesIO]

    def open(self, row: int) -> Image.Image:
        """Raises ValueError, naming it, for a picture that cannot be read."""
        return open_image(self.source(row), self.names[row])

    def smaller_side(self, row: int) -> int:
        """In pixels, read from the header alone; 0 for a file that is no picture."""
        try:
            with Image.open(self.source(row)) as file:
                return min(file.size)
        except (OSError, SyntaxError):
            return 0


def read_pictures(path: str | Path, caption_column: str = "text", image_column: str = "image") -> Captioned:
    """The captioned pictures below `path`.

    Looked for in this order: `metadata.jsonl` or `metadata.csv` (columns `file_name` and `caption_column`), `.parquet`
    files (columns `image_column` and `caption_column`), a `.txt` file beside each picture. Raises ValueError, naming the
    file, for a caption that is missing, and FileNotFoundError for a folder without pictures.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.path {path} is not a folder; name one with captioned pictures, or run `unclip data emoji --out {path}`"
        )
    if any((folder / f"metadata.{kind}").is_file() for kind in ("jsonl", "csv")):
        names, captions = _from_metadata(folder, caption_column)
    elif list(folder.glob("*.parquet")):
        return _from_parquet(folder, caption_column, image_column)
    else:
        names, captions = _from_text_files(folder)
    if not names:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}), no metadata and no parquet")
    return Captioned(names, captions, lambda row: folder / names[row])


def _from_metadata(folder: Path, caption_column: str) -> tuple[list[str], list[str]]:
    path = next(p for p in (folder / "metadata.jsonl", folder / "metadata.csv") if p.is_file())
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else _json_lines(path, file)
    names, captions = [], []
    for number, row in enumerate(rows, 1):
        name, caption = row.get("file_name"), row.get(caption_column)
        if not name:
            raise ValueError(f"{path}, row {number}: there is no file_name")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{path}, row {number}: {name} has no {caption_column!r}; columns: {', '.join(map(str, row))}")
        if not (folder / name).is_file():
            raise ValueError(f"{path}, row {number}: {folder / name} is not a file")
        names.append(name)
        captions.append(caption.strip())
    return names, captions


def _json_lines(path: Path, file: io.TextIOBase) -> list[dict]:
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def _from_text_files(folder: Path) -> tuple[list[str], list[str]]:
    names, captions = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        text = path.with_suffix(".txt")
        caption = " ".join(text.read_text(encoding="utf-8").split()) if text.is_file() else ""
        if not caption:
            raise ValueError(f"{path} has no caption: {text.name} is {'empty' if text.is_file() else 'missing'}")
        names.append(path.relative_to(folder).as_posix())
        captions.append(caption)
    return names, captions


def _from_parquet(folder: Path, caption_column: str, image_column: str) -> Captioned:
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=[str(p) for p in sorted(folder.glob("*.parquet"))], split="train")
    for column in (caption_column, image_column):
        if column not in rows.column_names:
            raise ValueError(f"{folder} has no column {column!r}; columns: {', '.join(rows.column_names)}")
    captions = list(rows[caption_column])
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{folder}, row {number} has no {caption_column!r}")
    encoded = rows.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))

    def source(row: int) -> Path | io.BytesIO:
        found = encoded[row][image_column]
        return io.BytesIO(found["bytes"]) if found["bytes"] else Path(found["path"])

    return Captioned([f"row {n}" for n in range(len(captions))], captions, source)


class _Shuffled(Dataset):
    """Endless examples in an order that is new in every epoch and the same on any machine; what won't open is skipped."""

    def __init__(
        self,
        path: str,
        split: str,
        seed: int,
        caption_column: str,
        image_column: str,
        max_unreadable: int,
    ):
        self.pictures = read_pictures(path, caption_column, image_column)
        names = self.pictures.names
        self.rows = [n for n, name in enumerate(names) if held_out(name) == (split != "train")]
        if not self.rows:  # a handful of pictures: what little there is serves both
            self.rows = list(range(len(names)))
        self.seed, self.max_unreadable = seed, max_unreadable
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._unreadable: set[str] = set()

    def open(self, index: int) -> tuple[int, Image.Image]:
        """The row of example `index` and its picture; the next one's where it cannot be read."""
        for later in range(self.max_unreadable + 1):
            row = self._row(index + later)
            try:
                return row, self.pictures.open(row)
            except ValueError as error:
                name = self.pictures.names[row]
                if name not in self._unreadable:
                    self._unreadable.add(name)
                    logger.warning("skipped, %d so far: %s", len(self._unreadable), error)
                if len(self._unreadable) > self.max_unreadable or len(self._unreadable) == len(self.rows):
                    raise ValueError(f"{len(self._unreadable)} pictures could not be read, the last: {error}") from None
        raise ValueError(f"more than {self.max_unreadable} pictures in a row could not be read")

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, 5, epoch]).permutation(self.rows)
        return int(self._order[place])

    def _random(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng([self.seed, 3, index]).random(16, dtype=np.float32))


class Pictures(_Shuffled):
    """Captioned squares of `size` px, the middle of each picture; the items are those of `EmojiScenes`."""

    def __init__(
        self,
        path: str,
        split: str = "train",
        seed: int = 0,
        size: int = 64,
        caption_column: str = "text",
        image_column: str = "image",
        max_unreadable: int = 100,
    ):
        super().__init__(path, split, seed, caption_column, image_column, max_unreadable)
        self.size = size

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, picture = self.open(index)
        caption = self.pictures.captions[row]
        return {
            "index": index,
            "image": _pixels(square(picture, self.size)),
            "caption": caption,
            "key": zlib.crc32(caption.encode()),
            "style": 0,
            "caption_style": -1,
            "random": self._random(index),
        }

    def held_out(self, limit: int = 2000) -> tuple[torch.Tensor, list[str]]:
        """Up to `limit` pictures [N, 3, S, S] in [0, 1] of this split with their captions, in order."""
        found = [(self.pictures.open(row), self.pictures.captions[row]) for row in self.rows[:limit]]
        return torch.stack([_pixels(square(p, self.size)).float() / 255 for p, _ in found]), [c for _, c in found]


class PictureCrops(_Shuffled):
    """Crops of pictures at `size` px, for the upsamplers; the items are those of `EmojiCrops`.

    Pictures smaller than `size` would teach blur: they are left out.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        seed: int = 0,
        size: int = 256,
        crop: float = 0.25,
        caption_column: str = "text",
        image_column: str = "image",
        max_unreadable: int = 100,
    ):
        super().__init__(path, split, seed, caption_column, image_column, max_unreadable)
        self.size, self.crop = size, crop
        everything = range(len(self.pictures.names))
        large = {row for row in everything if self.pictures.smaller_side(row) >= size}
        if not large:
            raise ValueError(f"no picture of {path} has {size} pixels a side, which this upsampler draws")
        if len(large) < len(everything) and split == "train":
            logger.warning("%d pictures are skipped: they have less than %d pixels a side", len(everything) - len(large), size)
        self.rows = [row for row in self.rows if row in large] or sorted(large)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, picture = self.open(index)
        rng = np.random.default_rng([self.seed, 4, index])
        side = round(self.crop * self.size)
        left, top = (int(v) for v in rng.integers(0, self.size - side + 1, 2))
        crop = square(picture, self.size).crop((left, top, left + side, top + side))
        return {"index": index, "image": _pixels(crop), "random": torch.from_numpy(rng.random(16, dtype=np.float32))}


def held_out(name: str) -> bool:
    """Whether the picture of this name is kept for validation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < HELD_OUT


def _pixels(picture: Image.Image) -> torch.Tensor:
    """[3, S, S] uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
