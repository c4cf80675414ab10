"""`unclip embed`: CLIP embeddings of captioned images, computed once."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Force, Model


def embed(  # noqa: PLR0913 - the parameters of a command are its options
    data: Annotated[str, typer.Argument(metavar="DATA", help="Captioned images, as data.path= takes them.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the embeddings.")],
    model: Model = "emoji",
    size: Annotated[int, typer.Option(help="Side of the images that CLIP sees: the training's data.size.")] = 64,
    dtype: Annotated[str, typer.Option(help="How they are kept: fp16, bf16 or fp32.")] = "fp16",
    shard: Annotated[int, typer.Option(help="Images in a file.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    caption_column: Annotated[str, typer.Option(help="Where the captions are.")] = "text",
    image_column: Annotated[str, typer.Option(help="Where the images are, of parquet and Hub datasets.")] = "image",
    subset: Annotated[str | None, typer.Option(help="Of a Hub dataset that has several.")] = None,
    max_unreadable: Annotated[int, typer.Option(help="Images that may fail to open before it stops.")] = 100,
    device: Device = None,
    force: Force = False,
) -> None:
    """Compute CLIP embeddings and token encodings once; `data.embeddings=OUT` trains from them. Resumable."""
    from tqdm import tqdm

    from ..data.image_files import read_captioned_images
    from ..runtime.precision import best_device
    from ..training.embed import embed as write
    from ..training.objectives.frozen_clip import FrozenCLIP

    images = read_captioned_images(data, caption_column, image_column, subset)
    frozen = FrozenCLIP.load(model).to(device or best_device())

    def progress(shards: Iterable) -> Iterable:
        return tqdm(shards, desc="shards", file=sys.stderr)

    unreadable = write(frozen, images, out, size, shard, batch_size, dtype, max_unreadable, force, progress)
    for error in unreadable:
        print(f"left out: {error}", file=sys.stderr)
    print(out)
