"""`unclip data`: building datasets."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .images import need, usable
from .options import Device, Force


def emoji(
    out: Annotated[Path, typer.Option(help="Folder of the dataset.")] = Path("data/emoji"),
    force: Force = False,
) -> None:
    """Build the captioned emoji dataset from npm packages (fetched with npm)."""
    from tqdm import tqdm

    need("resvg_py")
    from ..data.emoji import build

    def progress(items: Iterable, total: int) -> Iterable:
        return tqdm(items, total=total, desc="sprites", file=sys.stderr)

    counts = build(out, log=lambda text: print(text, file=sys.stderr), progress=progress, force=force)
    for split, kinds in counts.items():
        print(f"{split}: {sum(kinds.values())} images")


def phrases(
    model: Annotated[str, typer.Argument(help="A model, or the run of a CLIP: its text encoder is used.")] = "emoji",
    data: Annotated[Path, typer.Option(help="Folder of the emoji dataset.")] = Path("data/emoji"),
    device: Device = None,
) -> None:
    """Add to the emoji dataset the English phrases that a model's text encoder assigns to one of its concepts."""
    import torch
    from tqdm import tqdm

    from ..clip.model import CLIP
    from ..data.emoji import add_phrases
    from ..io.checkpoints import components_folder

    clip = CLIP.from_pretrained(components_folder(model), dtype=torch.float32).to(usable(device))

    def progress(items: Iterable, total: int) -> Iterable:
        return tqdm(items, total=total, desc="phrases", file=sys.stderr)

    count, concepts = add_phrases(data, clip.encode_text, progress)
    print(f"{count} phrases are assigned to {concepts} concepts")


def bank(  # noqa: PLR0913 - the parameters of a command are its options
    config: Annotated[Path, typer.Argument(help="A stage's configuration, whose data section says which scenes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("data/emoji/bank.npz"),
    plans: Annotated[int, typer.Option(help="How many scenes.")] = 1_000_000,
    model: Annotated[
        str | None,
        typer.Option(help="A model, or the run of a CLIP: its tokenizer is used for the captions. Default: objective.clip."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that make plans in parallel; the bank is the same.")] = 2,
    force: Force = False,
) -> None:
    """Precompute the plans of emoji scenes, so that training composes its batches on its device."""
    from tqdm import tqdm

    from ..data.bank_build import build_bank
    from ..io.checkpoints import components_folder, load_components, readable_size
    from ..runtime.config import load_config

    for name, value in (("plans", plans), ("processes", processes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists already; choose another file or pass --force")
    settings = load_config(config, overrides or [])
    clip = model or (settings.get("objective") or {}).get("clip")
    if clip is None:
        raise ValueError(f"{config} names no objective.clip, whose tokenizer the captions need; give one with --model")
    tokenizer = load_components(components_folder(clip), ["tokenizer"])["tokenizer"]

    def progress(chunks: Iterable, total: int) -> Iterable:
        return tqdm(chunks, total=total, desc="plans", file=sys.stderr)

    made = build_bank(settings.get("data") or {}, tokenizer, plans, ("train", settings.get("seed", 0)), processes, progress)
    made.save(out)
    print(f"{len(made)} plans, {len(made.lengths)} captions, {readable_size(out.stat().st_size)}")
