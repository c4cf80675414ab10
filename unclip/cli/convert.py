"""`unclip convert`: other systems' checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Force

Clip = Annotated[str | None, typer.Option(help="A transformers CLIP, as a folder or a Hub id; default: the original's.")]


def karlo(  # noqa: PLR0913 - the parameters of a command are its options
    prior: Annotated[Path, typer.Option(help="The prior's .ckpt.")],
    decoder: Annotated[Path, typer.Option(help="The decoder's .ckpt.")],
    sr: Annotated[Path, typer.Option(help="The super-resolution's .ckpt.")],
    clip_stats: Annotated[Path, typer.Option(help="ViT-L-14_stats.th.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new pipeline.")],
    clip: Clip = None,
    force: Force = False,
) -> None:
    """Karlo's original files as a pipeline folder of safetensors."""
    from ..pipelines.convert import CLIP_MODEL, convert_karlo

    print(convert_karlo(prior, decoder, sr, clip_stats, out, clip or CLIP_MODEL, force))


def kandinsky_prior(
    prior: Annotated[Path, typer.Option(help="The prior's .ckpt.")],
    clip_stats: Annotated[Path, typer.Option(help="ViT-L-14_stats.th.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new pipeline.")],
    clip: Clip = None,
    force: Force = False,
) -> None:
    """A Kandinsky 2 prior as a folder that predicts image embeddings (UnCLIPPriorPipeline)."""
    from ..pipelines.convert import CLIP_MODEL, convert_kandinsky_prior

    print(convert_kandinsky_prior(prior, clip_stats, out, clip or CLIP_MODEL, force))
