"""`unclip train` and `unclip export`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Force


def train(
    config: Annotated[Path, typer.Argument(help="A stage's configuration: a file, or a shipped one, as emoji/decoder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
) -> None:
    """Train a stage, or go on where its output folder left off."""
    from ..training.trainer import train as run

    run(config, overrides or [])


def export(
    parts: Annotated[
        list[Path], typer.Argument(metavar="RUN... OUT", help="Training runs (or folders of components), then the new folder.")
    ],
    default: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A sampling default, as decoder_guidance_scale=2.")
    ] = None,
    mean: Annotated[
        list[str] | None, typer.Option(metavar="COMPONENT", help="The mean of all runs' weights, as prior, not the last one's.")
    ] = None,
    storage: Annotated[
        str, typer.Option(help="fp16, or int8: half the size, weights in 8 bits with a scale for each output channel.")
    ] = "fp16",
    force: Force = False,
) -> None:
    """Assemble a pipeline folder (safetensors) from the stages' averaged weights."""
    from ..runtime.config import apply_overrides
    from ..training.export import export_pipeline

    if len(parts) < 2:
        raise ValueError("give at least one run and the folder to write")
    print(export_pipeline(parts[:-1], parts[-1], force, apply_overrides({}, default or []), mean=mean, storage=storage))
