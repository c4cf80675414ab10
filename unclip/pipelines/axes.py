"""The principal axes of CLIP's image embeddings: those of a model folder, of a folder of images or of a dataset."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..clip.model import CLIP
from ..clip.search import BATCH, Index
from ..data.scenes import IconSet, split_of_icon
from ..diffusion.latents import PrincipalAxes
from ..io.checkpoints import resolve
from ..io.hub import AXES_FILE


def axes_of(
    model: str, clip: CLIP, source: str | Path | None = None, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> PrincipalAxes:
    """The principal axes of the embeddings of `source`: a folder of images or an emoji dataset; None: the model's.

    Raises ValueError for a model that has none and for a source of fewer than two images.
    """
    if source is None:
        path = resolve(model) / AXES_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: this model has no principal axes of its own; name images with --of FOLDER")
        return PrincipalAxes.load(path)
    source = Path(source).expanduser()
    if (source / "icons.json.gz").is_file():
        icons = IconSet.load(source)
        rows = [n for n, i in enumerate(icons.icons) if split_of_icon(i["concept"], i["style"]) == "train"]
        chunks = [rows[n : n + BATCH] for n in range(0, len(rows), BATCH)]
        embeddings = torch.cat([clip.encode_image(icons.on_white(chunk)).cpu() for chunk in progress(chunks)])
    else:
        index = Index(source, clip)
        index.update(progress)
        embeddings = index.embeddings
    if len(embeddings) < 2:
        raise ValueError(f"{source} holds {len(embeddings)} images; principal axes need two or more")
    return PrincipalAxes.of(embeddings, clip.fingerprint)
