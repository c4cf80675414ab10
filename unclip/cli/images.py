"""Shared by the sampling commands: loading a pipeline, output files, and saving images with metadata."""

import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(model: str, device: str | None, dtype: str, low_memory: bool = False) -> Any:
    """The pipeline of a model on a device. Raises ValueError for an unknown model or device."""
    import diffusers
    import torch

    from ..pipelines import UnCLIPPipeline

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    where = usable(device)
    diffusers.utils.logging.disable_progress_bar()
    kwargs = {} if dtype == "auto" else {"dtype": getattr(torch, DTYPES[dtype])}
    return UnCLIPPipeline.from_pretrained(model, low_memory=low_memory, **kwargs).to(where)


def usable(device: str | None) -> "torch.device":
    """The device of that name, or the best one. Raises ValueError if it cannot be used."""
    import torch

    from ..runtime.precision import best_device

    try:
        where = torch.device(device) if device else best_device()
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return where


def need(*modules: str) -> None:
    """Raises ValueError, with how to install it, for a module that is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise ValueError(install_hint(module) or f"this needs {module}, which is not installed")


def install_hint(module: str | None) -> str | None:
    """How to install a module of one of the package's extras; None for any other module."""
    for line in requires("unclip") or []:
        name, extra = re.findall(r"[\w.-]+", line)[0], re.search(r"extra == ['\"](\w+)", line)
        if extra and module in (name.replace("-", "_"), name.removeprefix("python-")):
            return f"this needs {name}; install it with: pip install 'unclip[{extra[1]}]'"
    return None


def output_files(out: Path | None, names: list[str], force: bool) -> list[Path]:
    """The files for images called `names`: the file `out`, or files in a folder; checked before sampling."""
    if out is not None and out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out} must end in .png or be a folder")
        if len(names) > 1:
            raise ValueError(f"--out {out} is one file, but {len(names)} images were asked for; give a folder")
        files = [out]
    else:
        files = _unique([(out or Path(".")) / f"{name}.png" for name in names])
    check_free(files, force)
    return files


def check_free(files: list[Path], force: bool) -> None:
    """Raises ValueError for files that exist, unless `force` is set, or that cannot be written."""
    for path in files:
        if path.exists() and not force:
            raise ValueError(f"{path} exists; pass --force to overwrite it")
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # permissions alone do not tell
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


def _unique(files: list[Path]) -> list[Path]:
    """Number equal paths, so that a prompt given twice makes two files."""
    seen: dict[Path, int] = {}
    result = []
    for path in files:
        seen[path] = seen.get(path, 0) + 1
        result.append(path if seen[path] == 1 else path.with_stem(f"{path.stem}-{seen[path]}"))
    return result


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def embedding_bar(batches: Iterable) -> Iterable:
    """A progress bar for embedding images, if there is more than one batch."""
    from tqdm import tqdm

    batches = list(batches)
    return tqdm(batches, desc="embedding", file=sys.stderr, disable=len(batches) < 2)


def row(images: list) -> Any:
    """Images of one size side by side."""
    from PIL import Image

    sheet = Image.new("RGB", (images[0].width * len(images), images[0].height))
    for n, image in enumerate(images):
        sheet.paste(image, (n * image.width, 0))
    return sheet


def save(image: Any, path: Path, facts: dict[str, str] | None, transparent: bool = False) -> None:
    """Write a PNG atomically that says that it is synthetic, with `facts` as text chunks.

    `transparent` removes the white background.
    """
    from ..io.images import cut_out, save_image

    image = cut_out(image) if transparent else image
    write(path, lambda file: save_image(image, file, facts))


def write(path: Path, save_to: Callable[[Path], object]) -> None:
    """Write a file atomically. Raises ValueError if that fails."""
    from ..io.checkpoints import write_beside

    try:
        write_beside(path, save_to)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
