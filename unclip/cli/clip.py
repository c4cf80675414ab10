"""`unclip classify` and `unclip search`: zero-shot classification and search by CLIP."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .images import embedding_bar
from .options import Json, Model


def classify(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    labels: Annotated[list[str], typer.Argument(metavar="LABEL...", help="What it may show.")],
    model: Model = "emoji",
    as_json: Json = False,
) -> None:
    """Say which of the labels an image shows, without having been trained on them; best first."""
    from ..clip.model import CLIP
    from ..clip.search import classify as ranked
    from ..io.images import open_image

    query = open_image(image)
    for score, label in ranked(CLIP.from_pretrained(model), query, labels):
        print(_line(score, "label", label, as_json))


def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A sentence, or an image file.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the images are, in it and below it.")],
    top: Annotated[int, typer.Option(help="How many to list.")] = 10,
    model: Model = "emoji",
    as_json: Json = False,
    force: Annotated[bool, typer.Option("--force", help="Rebuild the index.")] = False,
) -> None:
    """List a folder's images that come nearest to a sentence or an image; the index is kept for the next time."""
    from ..clip.model import CLIP
    from ..clip.search import Index
    from .latent import image_or_text

    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    content = image_or_text(query)
    if isinstance(content, str) and not content.strip():
        raise ValueError(f"query is empty: {query!r}")
    index = Index(folder, CLIP.from_pretrained(model))
    unreadable = index.update(embedding_bar, rebuild=force)
    if unreadable:
        print(f"{len(unreadable)} files could not be read", file=sys.stderr)
    if not index.stamps:
        print(f"{folder} holds no image that can be read", file=sys.stderr)
    for score, name in index.search(content, top):
        print(_line(score, "path", str(folder / name), as_json))


def _line(score: float, kind: str, name: str, as_json: bool) -> str:
    return json.dumps({"score": round(score, 6), kind: name}) if as_json else f"{score:.4f}\t{name}"
