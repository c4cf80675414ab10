"""Training examples by index from the user's own captioned images."""

# N images, S side of an image in pixels

import hashlib
import io
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..io.images import open_image, square
from ..io.pixels import to_uint8_tensor, uint8_to_float
from .embeddings import EmbeddingCache
from .image_files import HUB, CaptionedFiles, hub_splits, read_captioned_images

logger = logging.getLogger(__name__)

HELD_OUT = 0.05  # share of the images that are held out for validation, by a hash of their names


@dataclass
class LoadedImage:
    """An image with its caption; `row` is None in a stream, `image` is None where only cached embeddings are read."""

    row: int | None
    caption: str
    image: Image.Image | None


class UnreadableImages:
    """Counts the images that could not be read, up to a limit."""

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"max_unreadable must be at least 0, got {limit}")
        self.limit = limit
        self.names: set[str] = set()

    def add(self, name: str, error: object, of: int | None = None) -> None:
        """Count an image. Raises ValueError once there are more than the limit, or once all `of` them are unreadable."""
        if name not in self.names:
            self.names.add(name)
            logger.warning("skipped, %d so far: %s", len(self.names), error)
        if len(self.names) > self.limit or len(self.names) == of:
            raise ValueError(f"{len(self.names)} images could not be read, the last: {error}") from None


@dataclass(eq=False)
class ShuffledImages:
    """Endless examples with random access, in an order that is new in every epoch and the same on any machine.

    Images that cannot be read are skipped; those smaller than `min_side` pixels are left out. Without `pixels`, only the
    captions and the `cache` of embeddings are read.

    Raises:
        ValueError: if no image is large enough.
    """

    files: CaptionedFiles
    split: str
    seed: int
    max_unreadable: int
    min_side: int = 0
    cache: EmbeddingCache | None = None
    pixels: bool = True

    def __post_init__(self) -> None:
        names, validation = self.files.names, self.files.validation
        large = self._large_enough()
        is_held_out = (held_out(n) if validation is None else row in validation for row, n in enumerate(names))
        self.rows = [row for row, held in enumerate(is_held_out) if held == (self.split != "train") and row in large]
        if not self.rows:  # too few images for a split of their own: all serve both
            self.rows = sorted(large)
        self.unreadable = UnreadableImages(self.max_unreadable)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def _large_enough(self) -> set[int]:
        """The rows of images with at least `min_side` pixels a side."""
        rows = range(len(self.files.names))
        if not self.min_side:
            return set(rows)
        large = {row for row in rows if self.files.smaller_side(row) >= self.min_side}
        if not large:
            raise ValueError(f"no image has {self.min_side} pixels a side, which this upsampler draws")
        if len(large) < len(rows) and self.split == "train":
            logger.warning("%d images are skipped: they have less than %d pixels a side", len(rows) - len(large), self.min_side)
        return large

    def open(self, index: int) -> LoadedImage:
        """Example `index`, or the next one that can be read."""
        for later in range(self.unreadable.limit + 1):
            row = self._row(index + later)
            name = self.files.names[row]
            if self.cache is not None and not self.cache.readable(row):
                self.unreadable.add(name, f"{name} could not be read when it was embedded", len(self.rows))
                continue
            try:
                return LoadedImage(row, self.files.captions[row], self.files.open(row) if self.pixels else None)
            except ValueError as error:
                self.unreadable.add(name, error, len(self.rows))
        raise ValueError(f"more than {self.unreadable.limit} images in a row could not be read")

    def first(self, limit: int) -> list[LoadedImage]:
        """The first `limit` of the split, in the data's own order."""
        found = []
        for row in self.rows:
            try:
                found.append(LoadedImage(row, self.files.captions[row], self.files.open(row)))
            except ValueError as error:
                self.unreadable.add(self.files.names[row], error, len(self.rows))
            if len(found) == limit:
                break
        return found

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, 5, epoch]).permutation(self.rows)
        return int(self._order[place])


@dataclass(eq=False)
class StreamedImages:
    """A Hub dataset read over the network as needed, shuffled within a buffer; the same order for the same seed.

    Example `index` is found by reading up to it: every data worker reads the whole stream, and a resumed run reads it up to
    the example where it stopped. If the dataset has no validation split, examples are held out by a hash of their captions.

    Raises:
        ValueError: for a column that the dataset lacks.
    """

    name: str
    split: str
    seed: int
    max_unreadable: int
    min_side: int = 0
    subset: str | None = None
    caption_column: str = "text"
    image_column: str = "image"

    BUFFER: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        from datasets import Image as ImageFeature

        self.columns = (self.caption_column, self.image_column)
        train, validation = hub_splits(self.name, self.subset, streaming=True)
        self.by_caption = validation is None
        stream = train if self.split == "train" or validation is None else validation
        known = stream.column_names
        for column in self.columns:
            if known is not None and column not in known:
                raise ValueError(f"{self.name} has no column {column!r}; columns: {', '.join(known)}")
        encoded = ImageFeature(decode=False)
        self.unshuffled = stream.select_columns(list(self.columns)).cast_column(self.image_column, encoded)
        self.stream = self.unshuffled.shuffle(seed=self.seed, buffer_size=self.BUFFER)
        self.unreadable = UnreadableImages(self.max_unreadable)
        self._restart()

    def __getstate__(self) -> dict[str, Any]:
        """For spawned data workers: the position in the stream is not pickled."""
        return {k: v for k, v in vars(self).items() if k not in ("_rows", "_buffer", "_start")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._restart()

    def _restart(self) -> None:
        self._rows, self._start = self._read(), 0
        self._buffer: list[tuple[str, dict]] = []

    def open(self, index: int) -> LoadedImage:
        """Example `index`, or the next one that can be read."""
        if index < self._start:
            self._restart()
        for _ in range(index - self._start - len(self._buffer)):  # examples of other workers
            next(self._rows)
        del self._buffer[: index - self._start]
        self._start = index
        for later in range(self.unreadable.limit + 1):
            while len(self._buffer) <= later:
                self._buffer.append(next(self._rows))
            caption, image = self._buffer[later]
            try:
                return LoadedImage(None, caption, self._decode(caption, image))
            except ValueError as error:
                self.unreadable.add(caption, error)
        raise ValueError(f"more than {self.unreadable.limit} images in a row could not be read")

    def first(self, limit: int) -> list[LoadedImage]:
        """The first `limit` of the split, in the data's own order."""
        found = []
        for caption, image in self._examples(self.unshuffled):
            try:
                found.append(LoadedImage(None, caption, self._decode(caption, image)))
            except ValueError as error:
                self.unreadable.add(caption, error)
            if len(found) == limit:
                break
        return found

    def _decode(self, caption: str, image: dict) -> Image.Image:
        return open_image(_file(image), f"{self.name}, {caption!r}")

    def _large(self, image: dict) -> bool:
        """Whether an image's header states at least `min_side` pixels; True if it is unreadable, which `open` reports."""
        try:
            with Image.open(_file(image)) as header:
                return min(header.size) >= self.min_side
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return True

    def _read(self) -> Iterator[tuple[str, dict]]:
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            empty = True
            for row in self._examples(self.stream):
                empty = False
                yield row
            if empty:
                large = f" of at least {self.min_side} pixels a side" if self.min_side else ""
                raise ValueError(f"the dataset {self.name!r} has no images{large} for {self.split}")
            epoch += 1

    def _examples(self, stream: Any) -> Iterator[tuple[str, dict]]:
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


def _open_source(
    data: "CaptionedImages | ImageCrops", min_side: int = 0, cache: EmbeddingCache | None = None, pixels: bool = True
) -> ShuffledImages | StreamedImages:
    """The images of a dataset's configuration, with random access unless it streams."""
    if not data.streaming:
        files = read_captioned_images(data.path, data.caption_column, data.image_column, data.subset)
        return ShuffledImages(files, data.split, data.seed, data.max_unreadable, min_side, cache, pixels)
    if not data.path.startswith(HUB):
        raise ValueError(f"data.streaming is for Hub datasets (data.path={HUB}OWNER/NAME), got {data.path}")
    if cache is not None:
        raise ValueError("data.embeddings wants images that can be read in any order: leave data.streaming out")
    columns: dict[str, Any] = {"subset": data.subset, "caption_column": data.caption_column, "image_column": data.image_column}
    return StreamedImages(data.path.removeprefix(HUB), data.split, data.seed, data.max_unreadable, min_side, **columns)


@dataclass(eq=False)
class CaptionedImages(Dataset):
    """Captioned centre crops of `size` px; the items are those of `EmojiScenes`.

    With `embeddings`, the folder of an `EmbeddingCache`, its fields are added; without `pixels` there is no `image` then.
    """

    path: str
    split: str = "train"
    seed: int = 0
    size: int = 64
    caption_column: str = "text"
    image_column: str = "image"
    max_unreadable: int = 100
    subset: str | None = None
    streaming: bool = False
    embeddings: str | None = None
    pixels: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        self.cache = EmbeddingCache(self.embeddings) if self.embeddings else None
        self.source = _open_source(self, cache=self.cache, pixels=self.pixels or self.cache is None)
        if self.cache is not None and isinstance(self.source, ShuffledImages):
            self.cache.check(self.source.files.names, self.source.files.captions, self.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.source.open(index)
        image = {} if found.image is None else {"image": to_uint8(square(found.image, self.size))}
        return {
            "index": index,
            "caption": found.caption,
            "key": zlib.crc32(found.caption.encode()),
            "style": 0,
            "caption_style": -1,
            "random": torch.from_numpy(np.random.default_rng([self.seed, 3, index]).random(16, dtype=np.float32)),
            **image,
            **(self.cache[found.row] if self.cache is not None and found.row is not None else {}),
        }

    def held_out(self, limit: int = 2000) -> tuple[torch.Tensor, list[str]]:
        """Up to `limit` images [N, 3, S, S] in [0, 1] of this split with their captions, in order."""
        found = self.source.first(limit)
        images = [uint8_to_float(to_uint8(square(o.image, self.size))) for o in found if o.image is not None]
        return torch.stack(images), [o.caption for o in found]


@dataclass(eq=False)
class ImageCrops(Dataset):
    """Crops of images at `size` px, for the upsamplers; the items are those of `EmojiCrops`.

    Images smaller than `size` are left out: enlarged, they would teach blur.
    """

    path: str
    split: str = "train"
    seed: int = 0
    size: int = 256
    crop: float = 0.25
    caption_column: str = "text"
    image_column: str = "image"
    max_unreadable: int = 100
    subset: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        self.source = _open_source(self, min_side=self.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.source.open(index).image
        assert image is not None  # opened with pixels
        rng = np.random.default_rng([self.seed, 4, index])
        side = round(self.crop * self.size)
        left, top = (int(v) for v in rng.integers(0, self.size - side + 1, 2))
        crop = square(image, self.size).crop((left, top, left + side, top + side))
        return {"index": index, "image": to_uint8(crop), "random": torch.from_numpy(rng.random(16, dtype=np.float32))}


def held_out(name: str) -> bool:
    """Whether the image of this name is kept for validation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < HELD_OUT


def to_uint8(image: Image.Image) -> torch.Tensor:
    """The image's pixels, uint8 [3, S, S]."""
    return to_uint8_tensor(image).contiguous()
