"""`unclip app`: the studio in the browser."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .images import embedding_bar, load, need
from .options import Device, Dtype, Model

Search = Annotated[Path | None, typer.Option(help="A folder of images that the page can search.")]


def app(
    model: Model = "emoji",
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Through Gradio's tunnel to others too, behind a password.")] = False,
    search: Search = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Open the studio: a page to draw with, on this machine's own address.

    In a Space or a container the environment says where: GRADIO_SERVER_NAME, and PORT where --port is not given.
    """
    need("gradio")
    from ..studio.launch import open_page, prepare

    port = _port_of_environment() if port is None else port
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port must be from 1 to 65535, got {port}")
    prepare()
    open_page(page(load(model, device, dtype), model, search), port, share, os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1")


def _port_of_environment() -> int | None:
    """PORT, as hosts of containers set it. Raises ValueError where that is no number."""
    given = os.environ.get("PORT", "")
    if given and not given.isdecimal():
        raise ValueError(f"PORT must be a number, got {given!r}")
    return int(given) if given else None


def page(
    pipe: Any, model: str, search: Path | None, worker: Any = None, content_filter: Callable | None = None, rate: Any = None
) -> Any:
    """The page for a loaded pipeline, and for the updated index of a folder."""
    from ..clip.search import Index
    from ..studio.generation import Studio
    from ..studio.layout import build

    studio, index = Studio(pipe, model, worker, content_filter, rate), None
    if search is not None:
        if not studio.has_image_tower:
            raise ValueError(f"the model {model} has no image tower: it cannot search images")
        index = Index(search, pipe.clip)
        index.update(embedding_bar)
    return build(studio, index)
