"""The user's own captioned images: folders with captions beside them or in metadata, parquet, WebDataset, Hub datasets."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..io.images import SUFFIXES, open_image

HUB = "hub:"  # prefix of the name of a dataset on the Hugging Face Hub


@dataclass
class CaptionedFiles:
    """Names and captions of images; `source(row)` gives the file of a row, or its bytes."""

    names: list[str]
    captions: list[str]
    source: Callable[[int], Path | io.BytesIO]
    validation: range | None = None  # the rows of the dataset's own validation split, if it has one

    def open(self, row: int) -> Image.Image:
        """Raises ValueError, naming it, for an image that cannot be read."""
        return open_image(self.source(row), self.names[row])

    def smaller_side(self, row: int) -> int:
        """The smaller side in pixels, read from the header; 0 for a file that is no image."""
        try:
            with Image.open(self.source(row)) as file:
                return min(file.size)
        except (OSError, SyntaxError):
            return 0


def check_there(path: str | Path) -> None:
    """Raises FileNotFoundError, naming the alternatives, if `path` is no folder, `.tar` file or Hub dataset."""
    folder = Path(path).expanduser()
    if not (str(path).startswith(HUB) or folder.is_dir() or (folder.is_file() and folder.suffix == ".tar")):
        raise FileNotFoundError(
            f"data.path {path} is not a folder; name one with captioned images, or run `unclip data emoji --out {path}`; "
            f"a Hub dataset is {HUB}OWNER/NAME"
        )


def read_captioned_images(
    path: str | Path, caption_column: str = "text", image_column: str = "image", subset: str | None = None
) -> CaptionedFiles:
    """The captioned images at `path`: a folder, a `.tar` file, or `hub:` and a Hub dataset's name (or a folder of one).

    In a folder these are looked for, in this order: `metadata.jsonl` or `metadata.csv` (columns `file_name` and
    `caption_column`), `.parquet` files (columns `image_column` and `caption_column`), WebDataset shards (`.tar`; captions
    from `.txt`, or `caption_column` of `.json`), a `.txt` file beside each image. `subset` is a Hub dataset's, of
    several. Raises ValueError, naming the file, for a caption that is missing, and FileNotFoundError for no images.
    """
    check_there(path)
    if str(path).startswith(HUB):
        return _from_hub(str(path).removeprefix(HUB), subset, caption_column, image_column)
    folder = Path(path).expanduser()
    if folder.is_file():
        return _from_tars([folder], caption_column)
    if any((folder / f"metadata.{kind}").is_file() for kind in ("jsonl", "csv")):
        names, captions = _from_metadata(folder, caption_column)
    elif list(folder.glob("*.parquet")):
        return _from_parquet(folder, caption_column, image_column)
    elif list(folder.glob("*.tar")):
        return _from_tars(sorted(folder.glob("*.tar")), caption_column)
    else:
        names, captions = _from_text_files(folder)
    if not names:
        raise FileNotFoundError(
            f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}), no metadata, no parquet and no .tar shards"
        )
    return CaptionedFiles(names, captions, _Files(folder, names))


# Sources of images. Classes rather than closures, because spawned data workers pickle them.


@dataclass
class _Files:
    folder: Path
    names: list[str]

    def __call__(self, row: int) -> Path:
        return self.folder / self.names[row]


@dataclass
class _Rows:
    rows: Any
    column: str

    def __call__(self, row: int) -> Path | io.BytesIO:
        found = self.rows[row][self.column]
        return io.BytesIO(found["bytes"]) if found["bytes"] else Path(found["path"])


@dataclass
class _Shards:
    places: list[tuple[Path, int, int]]  # file, first byte, bytes

    def __call__(self, row: int) -> io.BytesIO:
        path, start, size = self.places[row]
        with open(path, "rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(size))


def _from_metadata(folder: Path, caption_column: str) -> tuple[list[str], list[str]]:
    path = next(p for p in (folder / "metadata.jsonl", folder / "metadata.csv") if p.is_file())
    text = _text(path)
    rows = list(csv.DictReader(io.StringIO(text, newline=""))) if path.suffix == ".csv" else _json_lines(path, text)
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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # skips a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from None


def _json_lines(path: Path, text: str) -> list[dict]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object: {line.strip()[:50]}")
        rows.append(row)
    return rows


def _from_text_files(folder: Path) -> tuple[list[str], list[str]]:
    names, captions = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        text = path.with_suffix(".txt")
        caption = " ".join(_text(text).split()) if text.is_file() else ""
        if not caption:
            raise ValueError(f"{path} has no caption: {text.name} is {'empty' if text.is_file() else 'missing'}")
        names.append(path.relative_to(folder).as_posix())
        captions.append(caption)
    return names, captions


def _from_parquet(folder: Path, caption_column: str, image_column: str) -> CaptionedFiles:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=[str(p) for p in sorted(folder.glob("*.parquet"))], split="train")
    return _from_rows(rows, str(folder), caption_column, image_column)


def _from_hub(name: str, subset: str | None, caption_column: str, image_column: str) -> CaptionedFiles:
    from datasets import concatenate_datasets

    train, validation = hub_splits(name, subset, streaming=False)
    if validation is None:
        return _from_rows(train, name, caption_column, image_column)
    found = _from_rows(concatenate_datasets([train, validation]), name, caption_column, image_column)
    return replace(found, validation=range(len(train), len(train) + len(validation)))


def hub_splits(name: str, subset: str | None, streaming: bool) -> tuple[Any, Any | None]:
    """The training and the validation split (or None) of a Hub dataset. Raises ValueError with a message of one line."""
    from datasets import load_dataset

    try:
        found = load_dataset(name, subset, streaming=streaming)
    except Exception as error:  # a dozen kinds: not found, gated, offline, several subsets, a script
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the dataset {name!r} could not be loaded: {reason}") from error
    train = found["train"] if "train" in found else next(iter(found.values()))
    held = next((found[split] for split in ("validation", "valid", "test") if split in found), None)
    return train, None if held is train else held


def _from_rows(rows: Any, where: str, caption_column: str, image_column: str) -> CaptionedFiles:
    from datasets import Image as ImageFeature

    for column in (caption_column, image_column):
        if column not in rows.column_names:
            raise ValueError(f"{where} has no column {column!r}; columns: {', '.join(rows.column_names)}")
    captions = list(rows[caption_column])
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}, row {number} has no {caption_column!r}")
    encoded = rows.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    return CaptionedFiles([f"row {n}" for n in range(len(captions))], captions, _Rows(encoded, image_column))


def _from_tars(paths: list[Path], caption_column: str) -> CaptionedFiles:
    """WebDataset shards, not unpacked: the headers give the offset of every image."""
    names, captions, places = [], [], []
    for path in paths:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.isfile():
                        folder, _, base = member.name.rpartition("/")
                        key, _, kind = base.partition(".")
                        samples.setdefault(f"{folder}/{key}" if folder else key, {})[f".{kind.lower()}"] = member
                for key, parts in samples.items():
                    image = next((m for kind, m in parts.items() if kind in SUFFIXES), None)
                    if image is None:
                        continue
                    caption = _tar_caption(tar, parts, caption_column)
                    if not caption:
                        raise ValueError(
                            f"{path}: {image.name} has no caption: no {key}.txt, nor {caption_column!r} in {key}.json"
                        )
                    names.append(f"{path.name}/{image.name}")
                    captions.append(caption)
                    places.append((path, image.offset_data, image.size))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    if not names:
        raise FileNotFoundError(f"{paths[0]} holds no images ({', '.join(sorted(SUFFIXES))})")
    return CaptionedFiles(names, captions, _Shards(places))


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # members are regular files
    return file.read()


def _tar_caption(tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], column: str) -> str:
    if ".txt" in parts:
        return " ".join(_member(tar, parts[".txt"]).decode("utf-8", "replace").split())
    if ".json" in parts:
        try:
            caption = json.loads(_member(tar, parts[".json"])).get(column)
        except (ValueError, AttributeError):
            raise ValueError(f"{tar.name!s}: {parts['.json'].name} is no JSON object") from None
        return caption.strip() if isinstance(caption, str) else ""
    return ""
