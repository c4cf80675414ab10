"""`unclip plot`: loss curves of training runs."""

from pathlib import Path
from typing import Annotated

import typer

from .images import check_free
from .options import Force


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Training runs: folders with a log.jsonl.")],
    out: Annotated[Path | None, typer.Option(help="A .png file; default: curves.png in the (first) run.")] = None,
    force: Force = False,
) -> None:
    """Draw the loss curves of training runs, in training and held out, in all and by noise level; print the file's name."""
    from ..training.plot import plot as draw

    path = out or runs[0] / "curves.png"
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path} must end in .png")
    check_free([path], force or out is None)  # the default is this command's own file
    print(draw(runs, path))
