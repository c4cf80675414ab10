"""`unclip data`: building datasets."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Force
from .pictures import need, usable


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


def phrases(
    model: Annotated[str, typer.Argument(help="A model, or the run of a CLIP: its text encoder is asked.")] = "emoji",
    data: Annotated[Path, typer.Option(help="Folder of the emoji dataset.")] = Path("data/emoji"),
    device: Device = None,
) -> None:
    """Add to the emoji dataset the phrases of English that a model's text encoder hears as one of its concepts."""
    import torch
    from tqdm import tqdm

    from ..clip.model import CLIP
    from ..data.emoji import hear_phrases
    from ..io.checkpoints import components_folder

    clip = CLIP.from_pretrained(components_folder(model), dtype=torch.float32).to(usable(device))

    def progress(items, total):
        return tqdm(items, total=total, desc="phrases", file=sys.stderr)

    heard, concepts = hear_phrases(data, clip.encode_text, progress)
    print(f"{heard} phrases are heard as {concepts} concepts")
