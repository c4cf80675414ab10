"""Checks of the page's inputs, with an error message of one line; a browser's own checks can be bypassed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like
from PIL import Image, ImageChops

from ..io.images import with_margins
from ..server.worker import Busy

MAX_PROMPT = 1000  # characters
MAX_IMAGES = 8
MAX_BLEND_IMAGES = 16  # the largest number of images in the gallery
MAX_SEED = 2**31 - 1  # exact in number fields of every browser

# Fields that are restored from a PNG's metadata: name -> parser.
RESTORED: dict[str, Callable[[str], Any]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "size": int,
    "guidance": float,
    "steps": int,
    "sampler": str,
    "transparent": "yes".__eq__,
}
BOUNDS = {"seed": (0, MAX_SEED), "guidance": (1, 20), "steps": (1, 100)}


def restored(facts: dict[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    """A field's value from an image's metadata; None if it is missing or out of the field's range."""
    try:
        value = kind(facts[name])
    except (KeyError, ValueError):
        return None
    low, high = BOUNDS.get(name, (None, None))
    fits = len(value) <= MAX_PROMPT if isinstance(value, str) else low is None or low <= value <= high
    return value if fits else None


def restored_message(facts: dict[str, str], back: list[str], model: str) -> str:
    """The message that lists which settings were restored, which the file lacks, and which this page cannot set."""
    silent = [name for name in RESTORED if name not in facts]
    given = {n: v for n, v in facts.items() if n not in back and n != "version" and (n, v) != ("model", model)}
    unknown = [f"{readable(name)} {v if len(v) <= 40 else v[:40] + '…'!r}" for name, v in given.items()]
    if back and not silent and not unknown:
        return "The settings of that image are restored."
    say = f"Restored: {', '.join(map(readable, back))}." if back else "No setting is restored."
    say += f" Left as they were, for the file does not say them: {', '.join(map(readable, silent))}." if silent else ""
    return say + (f" Not to be set on this page: {', '.join(unknown)}." if unknown else "")


def readable(name: str) -> str:
    return name.replace("_", " ")


def inpainting_inputs(
    image: Image.Image, layers: list[Image.Image], rectangle: list[float], margins: list[float]
) -> tuple[Image.Image, Image.Image]:
    """Image and mask (white is inpainted) from painted layers, a rectangle and margins, both in percent.

    Raises ValueError for an empty mask.
    """
    mask = Image.new("L", image.size, 0)
    for layer in layers:
        painted = layer.convert("RGBA").getchannel("A").resize(image.size)
        mask = ImageChops.lighter(mask, painted.point(lambda a: 255 if a > 16 else 0))
    left, top, width, height = rectangle
    if width and height:
        box = [left * image.width, top * image.height, (left + width) * image.width, (top + height) * image.height]
        x0, y0, x1, y1 = (round(min(b / 100, side)) for b, side in zip(box, image.size * 2, strict=True))
        mask.paste(255, (x0, y0, x1, y1))
    if any(margins):
        sides = (image.width, image.width, image.height, image.height)
        new = [math.ceil(m * side / 100) for m, side in zip(margins, sides, strict=True)]
        image, beyond = with_margins(image, *new)
        inside = Image.new("L", image.size, 0)
        inside.paste(mask, (new[0], new[2]))
        mask = ImageChops.lighter(beyond, inside)
    if not np.array(mask).any():
        raise ValueError("paint over what is to be drawn anew, or give a rectangle or new space as numbers")
    return image, mask


def check_uploaded(file: dict[str, Any]) -> dict[str, Any]:
    """A file's metadata as Gradio's client sends it. Refuses URLs, and paths that Gradio would not check to be uploads."""
    if not is_file_obj_with_meta(file) or is_http_url_like(file["path"]):
        raise gr.Error("Only files that were uploaded to this page are taken.", print_exception=False)
    return file


def upload_bytes(name: str, file: Any) -> bytes:
    """The content of an uploaded file, given by its path or Gradio's metadata. Raises gr.Error if there is none."""
    path = file.get("path") if isinstance(file, dict) else file
    if not isinstance(path, str) or not path:
        raise gr.Error(f"Give {name} first.", print_exception=False)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError):
        raise gr.Error(f"{name} is here no more: upload it again.".capitalize(), print_exception=False) from None


def client_of(request: gr.Request) -> str:
    """Whose rate a request counts on: its key's name, else its address."""
    return request.username or request.client.host


def page_of(request: gr.Request) -> str:
    """The id of the open page that sent a request."""
    return request.session_hash or ""


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in bounds. Raises gr.Error for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not low <= value <= high or value % 1:
        raise gr.Error(f"The {name} must be a whole number from {low} to {high}, got {value!r}.", print_exception=False)
    return int(value)


def number_between(name: str, value: Any, low: float, high: float) -> float:
    """A number in bounds. Raises gr.Error for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise gr.Error(f"The {name} must be a number from {low} to {high}, got {value!r}.", print_exception=False)
    return value


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors of user input into messages on the page."""
    try:
        yield
    except (ValueError, Busy) as error:
        raise gr.Error(str(error), print_exception=False) from None
