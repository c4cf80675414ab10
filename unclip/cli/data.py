"""`unclip data`: building datasets."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Force
from .pictures import need


def emoji(
    out: Annotated[Path, typer.Option(help="Folder of the dataset.")] = Path("data/emoji"),
    force: Force = False,
) -> None:
    """Build the captioned emoji dataset from npm packages (fetched with npm)."""
    from tqdm import tqdm

    need("resvg_py")
    from ..data.emoji import build

    def progress(items, total):
        return tqdm(items, total=total, desc="sprites", file=sys.stderr)

    counts = build(out, log=lambda text: print(text, file=sys.stderr), progress=progress, force=force)
    for split, kinds in counts.items():
        print(f"{split}: {sum(kinds.values())} pictures")
