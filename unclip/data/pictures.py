"""Training examples from one's own captioned pictures, by index."""

# S side of a picture in pixels

import hashlib
import io
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..io.images import open_image, square
from .embeddings import EmbeddingCache
from .reading import HUB, Captioned, hub_splits, read_pictures

logger = logging.getLogger(__name__)

HELD_OUT = 0.05  # the share of the pictures that is kept for validation, by a hash of their names


@dataclass
class Opened:
    """What example `index` came out as; `row` is None in a stream, `picture` where nobody asked for its pixels."""

    row: int | None
    caption: str
    picture: Image.Image | None


class Unreadable:
    """The count of what could not be opened, up to a limit."""

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"max_unreadable must be at least 0, got {limit}")
        self.limit, self.names = limit, set()

    def add(self, name: str, error: object, of: int | None = None) -> None:
        """Raises ValueError once there are more than the limit, or all `of` them."""
        if name not in self.names:
            self.names.add(name)
            logger.warning("skipped, %d so far: %s", len(self.names), error)
        if len(self.names) > self.limit or len(self.names) == of:
            raise ValueError(f"{len(self.names)} pictures could not be read, the last: {error}") from None


class Shuffled:
    """Endless examples in an order that is new in every epoch and the same on any machine; what won't open is skipped.

    Pictures smaller than `min_side` pixels are left out.
    """

    def __init__(
        self,
        pictures: Captioned,
        split: str,
        seed: int,
        max_unreadable: int,
        min_side: int = 0,
        cache: EmbeddingCache | None = None,
        pixels: bool = True,
    ):
        self.pictures, self.seed, self.cache, self.pixels = pictures, seed, cache, pixels
        names, kept = pictures.names, pictures.validation
        large = set(range(len(names)))
        if min_side:
            large = {row for row in large if pictures.smaller_side(row) >= min_side}
            if not large:
                raise ValueError(f"no picture has {min_side} pixels a side, which this upsampler draws")
            if len(large) < len(names) and split == "train":
                logger.warning(
                    "%d pictures are skipped: they have less than %d pixels a side", len(names) - len(large), min_side
                )
        chosen = (held_out(n) if kept is None else row in kept for row, n in enumerate(names))
        self.rows = [row for row, held in enumerate(chosen) if held == (split != "train") and row in large]
        if not self.rows:  # a handful of pictures: what little there is serves both
            self.rows = sorted(large)
        self.unreadable = Unreadable(max_unreadable)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def open(self, index: int) -> Opened:
        """Example `index`; the next one where it cannot be read."""
        for later in range(self.unreadable.limit + 1):
            row = self._row(index + later)
            name = self.pictures.names[row]
            if self.cache is not None and not self.cache.readable(row):
                self.unreadable.add(name, f"{name} could not be read when it was embedded", len(self.rows))
                continue
            try:
                return Opened(row, self.pictures.captions[row], self.pictures.open(row) if self.pixels else None)
            except ValueError as error:
                self.unreadable.add(name, error, len(self.rows))
        raise ValueError(f"more than {self.unreadable.limit} pictures in a row could not be read")

    def first(self, limit: int) -> list[Opened]:
        """The first `limit` of the split, in the data's own order."""
        found = []
        for row in self.rows:
            try:
                found.append(Opened(row, self.pictures.captions[row], self.pictures.open(row)))
            except ValueError as error:
                self.unreadable.add(self.pictures.names[row], error, len(self.rows))
            if len(found) == limit:
                break
        return found

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, 5, epoch]).permutation(self.rows)
        return int(self._order[place])


class Streamed:
    """A Hub dataset read from the network as it is needed, shuffled within a buffer; the same order for the same seed.

    Example `index` is found by reading up to it: every data worker reads the whole stream, and so does a resumed run up to
    where it was. Without a split of its own, a picture is held out by its caption.
    """

    BUFFER = 1000

    def __init__(
        self,
        name: str,
        split: str,
        seed: int,
        max_unreadable: int,
        min_side: int = 0,
        subset: str | None = None,
        caption_column: str = "text",
        image_column: str = "image",
    ):
        from datasets import Image as ImageFeature

        self.name, self.split, self.min_side = name, split, min_side
        self.columns = (caption_column, image_column)
        train, validation = hub_splits(name, subset, streaming=True)
        self.by_caption = validation is None
        stream = train if split == "train" or validation is None else validation
        known = stream.column_names
        for column in self.columns:
            if known is not None and column not in known:
                raise ValueError(f"{name} has no column {column!r}; columns: {', '.join(known)}")
        self.plain = stream.select_columns(list(self.columns)).cast_column(image_column, ImageFeature(decode=False))
        self.stream = self.plain.shuffle(seed=seed, buffer_size=self.BUFFER)
        self.unreadable = Unreadable(max_unreadable)
        self._restart()

    def __getstate__(self) -> dict[str, Any]:
        """For data workers that are not forked: how far it has read stays behind."""
        return {k: v for k, v in vars(self).items() if k not in ("_rows", "_kept", "_start")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._restart()

    def _restart(self) -> None:
        self._rows, self._kept, self._start = self._read(), [], 0

    def open(self, index: int) -> Opened:
        """Example `index`; the next one where it cannot be read."""
        if index < self._start:
            self._restart()
        for _ in range(index - self._start - len(self._kept)):  # what nobody asked this worker for
            next(self._rows)
        del self._kept[: index - self._start]
        self._start = index
        for later in range(self.unreadable.limit + 1):
            while len(self._kept) <= later:
                self._kept.append(next(self._rows))
            caption, image = self._kept[later]
            try:
                return Opened(None, caption, self._picture(caption, image))
            except ValueError as error:
                self.unreadable.add(caption, error)
        raise ValueError(f"more than {self.unreadable.limit} pictures in a row could not be read")

    def first(self, limit: int) -> list[Opened]:
        """The first `limit` of the split, in the data's own order."""
        found = []
        for caption, image in self._chosen(self.plain):
            try:
                found.append(Opened(None, caption, self._picture(caption, image)))
            except ValueError as error:
                self.unreadable.add(caption, error)
            if len(found) == limit:
                break
        return found

    def _picture(self, caption: str, image: dict) -> Image.Image:
        return open_image(_file(image), f"{self.name}, {caption!r}")

    def _large(self, image: dict) -> bool:
        """Whether a picture's header does not say that it is too small; one that cannot be read is told of when it is drawn."""
        try:
            with Image.open(_file(image)) as picture:
                return min(picture.size) >= self.min_side
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return True

    def _read(self) -> Iterator[tuple[str, dict]]:
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            empty = True
            for row in self._chosen(self.stream):
                empty = False
                yield row
            if empty:
                large = f" of at least {self.min_side} pixels a side" if self.min_side else ""
                raise ValueError(f"the dataset {self.name!r} has no pictures{large} for {self.split}")
            epoch += 1

    def _chosen(self, stream: Any) -> Iterator[tuple[str, dict]]:
        text, image = self.columns
        for row in stream:
            caption = row[text]
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"{self.name}: a row has no {text!r}, got {caption!r}")
            wanted = not self.by_caption or held_out(caption) == (self.split != "train")
            if wanted and (not self.min_side or self._large(row[image])):
                yield caption.strip(), row[image]


def _file(image: dict) -> io.BytesIO | str:
    return io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]


def _source(path: str, split: str, seed: int, max_unreadable: int, min_side: int, columns: dict, streaming: bool, **cached):
    """Random access where the data allows it, else the stream."""
    if not streaming:
        return Shuffled(read_pictures(path, **columns), split, seed, max_unreadable, min_side, **cached)
    if not str(path).startswith(HUB):
        raise ValueError(f"data.streaming is for Hub datasets (data.path={HUB}OWNER/NAME), got {path}")
    if cached.get("cache") is not None:
        raise ValueError("data.embeddings wants pictures that can be read in any order: leave data.streaming out")
    return Streamed(str(path).removeprefix(HUB), split, seed, max_unreadable, min_side, **columns)


class Pictures(Dataset):
    """Captioned squares of `size` px, the middle of each picture; the items are those of `EmojiScenes`.

    With `embeddings`, the folder of an `EmbeddingCache`, its fields are added; without `pixels` there is no `image` then.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        seed: int = 0,
        size: int = 64,
        caption_column: str = "text",
        image_column: str = "image",
        max_unreadable: int = 100,
        subset: str | None = None,
        streaming: bool = False,
        embeddings: str | None = None,
        pixels: bool = True,
    ):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        columns = {"caption_column": caption_column, "image_column": image_column, "subset": subset}
        self.cache = EmbeddingCache(embeddings) if embeddings else None
        cached = {} if streaming and self.cache is None else {"cache": self.cache, "pixels": pixels or self.cache is None}
        self.source = _source(path, split, seed, max_unreadable, 0, columns, streaming, **cached)
        if self.cache is not None:
            self.cache.check(self.source.pictures.names, self.source.pictures.captions, size)
        self.size, self.seed = size, seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.source.open(index)
        image = {} if found.picture is None else {"image": pixels(square(found.picture, self.size))}
        return {
            "index": index,
            "caption": found.caption,
            "key": zlib.crc32(found.caption.encode()),
            "style": 0,
            "caption_style": -1,
            "random": torch.from_numpy(np.random.default_rng([self.seed, 3, index]).random(16, dtype=np.float32)),
            **image,
            **(self.cache[found.row] if self.cache is not None else {}),
        }

    def held_out(self, limit: int = 2000) -> tuple[torch.Tensor, list[str]]:
        """Up to `limit` pictures [N, 3, S, S] in [0, 1] of this split with their captions, in order."""
        found = self.source.first(limit)
        return torch.stack([pixels(square(o.picture, self.size)).float() / 255 for o in found]), [o.caption for o in found]


class PictureCrops(Dataset):
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
        subset: str | None = None,
        streaming: bool = False,
    ):
        columns = {"caption_column": caption_column, "image_column": image_column, "subset": subset}
        self.source = _source(path, split, seed, max_unreadable, size, columns, streaming)
        self.size, self.crop, self.seed = size, crop, seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.source.open(index).picture
        rng = np.random.default_rng([self.seed, 4, index])
        side = round(self.crop * self.size)
        left, top = (int(v) for v in rng.integers(0, self.size - side + 1, 2))
        crop = square(picture, self.size).crop((left, top, left + side, top + side))
        return {"index": index, "image": pixels(crop), "random": torch.from_numpy(rng.random(16, dtype=np.float32))}


def held_out(name: str) -> bool:
    """Whether the picture of this name is kept for validation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < HELD_OUT


def pixels(picture: Image.Image) -> torch.Tensor:
    """[3, S, S] uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
