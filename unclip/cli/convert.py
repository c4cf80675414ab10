"""`unclip convert`: other systems' checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Force


def karlo(
    prior: Annotated[Path, typer.Option(help="The prior's .ckpt.")],
    decoder: Annotated[Path, typer.Option(help="The decoder's .ckpt.")],
    sr: Annotated[Path, typer.Option(help="The super-resolution's .ckpt.")],
    clip_stats: Annotated[Path, typer.Option(help="ViT-L-14_stats.th.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new pipeline.")],
    clip: Annotated[str, typer.Option(help="A transformers CLIP: a folder or a Hub id.")] = "openai/clip-vit-large-patch14",
    force: Force = False,
) -> None:
    """Karlo's original files as a pipeline folder of safetensors."""
    from ..convert import convert_karlo

    print(convert_karlo(prior, decoder, sr, clip_stats, out, clip, force))


def kandinsky_prior(
    prior: Annotated[Path, typer.Option(help="The prior's .ckpt.")],
    clip_stats: Annotated[Path, typer.Option(help="ViT-L-14_stats.th.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new pipeline.")],
    clip: Annotated[str, typer.Option(help="A transformers CLIP: a folder or a Hub id.")] = "openai/clip-vit-large-patch14",
    force: Force = False,
) -> None:
    """A Kandinsky 2 prior as a folder that predicts image embeddings (UnCLIPPriorPipeline)."""
    from ..convert import convert_kandinsky_prior

    print(convert_kandinsky_prior(prior, clip_stats, out, clip, force))
