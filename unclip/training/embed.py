"""Writing the cache of CLIP's embeddings that prior and decoder can be trained from."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..data.captioned_images import to_uint8
from ..data.embeddings import EMPTY, MANIFEST, data_fingerprint, shard_name
from ..data.image_files import CaptionedFiles
from ..io.checkpoints import check_safetensors, save_tensors, write_beside
from ..io.images import square
from ..io.pixels import normalize
from .objectives.frozen_clip import FrozenCLIP

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@torch.no_grad()
def embed(
    clip: FrozenCLIP,
    images: CaptionedFiles,
    out: Path,
    size: int = 64,
    rows: int = 4096,
    batch: int = 64,
    dtype: str = "fp16",
    max_unreadable: int = 100,
    force: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[str]:
    """Write the embeddings and token encodings of all `images` to shards of `rows` in `out`; -> the names of unreadable ones.

    Each shard is written beside and renamed, so that the same call after a kill goes on where it stopped. Raises
    ValueError where `out` holds another CLIP's embeddings or other images', unless `force` replaces them.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("size", size), ("rows", rows), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    manifest = {
        "fingerprint": clip.fingerprint,
        "dim": clip.dim,
        "tokens": clip.text([""])[1].shape[1],
        "data": data_fingerprint(images.names, images.captions),
        "size": size,
        "count": len(images.names),
        "rows": rows,
        "dtype": dtype,
    }
    _begin(out, manifest, force)
    _write(out / EMPTY, dict(zip(("text_embeds", "encodings", "mask"), clip.text([""]), strict=True)))
    unreadable: list[str] = []
    for number in progress(range(-(-len(images.names) // rows))):
        path = out / shard_name(number)
        if path.is_file() and check_safetensors(path):
            continue
        chosen = range(number * rows, min((number + 1) * rows, len(images.names)))
        parts = [_embed(clip, images, list(chosen[n : n + batch]), size, unreadable) for n in range(0, len(chosen), batch)]
        if len(unreadable) > max_unreadable:
            raise ValueError(f"{len(unreadable)} pictures could not be read, the last: {unreadable[-1]}")
        shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shard["ends"] = shard.pop("lengths").cumsum(0)
        _write(path, {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in shard.items()})
    return unreadable


def _embed(clip: FrozenCLIP, images: CaptionedFiles, rows: list[int], size: int, unreadable: list[str]) -> dict[str, Tensor]:
    opened: list[Tensor | None] = []
    for row in rows:
        try:
            opened.append(to_uint8(square(images.open(row), size)))
        except ValueError as error:
            unreadable.append(str(error))
            opened.append(None)
    blank = torch.zeros(3, size, size, dtype=torch.uint8)
    stacked = torch.stack([blank if image is None else image for image in opened]).to(clip.scale.device)
    text_embeds, encodings, mask = clip.text([images.captions[row] for row in rows])
    found = {
        "image_embeds": clip.image(normalize(stacked)),
        "text_embeds": text_embeds,
        "encodings": encodings[mask],
        "lengths": mask.sum(1),
        "readable": torch.tensor([image is not None for image in opened], dtype=torch.uint8),
    }
    return {name: tensor.cpu() for name, tensor in found.items()}


def _begin(out: Path, manifest: dict, force: bool) -> None:
    path = out / MANIFEST
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            if not force:
                raise ValueError(f"{path} is damaged; pass --force to write the embeddings again") from None
            held = {}
        differs = [k for k in manifest if held.get(k) != manifest[k]]
        if not differs:
            return
        if not force:
            what = {"fingerprint": "another CLIP's embeddings", "data": "the embeddings of other pictures or captions"}
            said = what.get(differs[0], f"embeddings made with {differs[0]} {held.get(differs[0])}")
            key = differs[0]
            raise ValueError(f"{out} holds {said} ({key}: {held.get(key)}, now {manifest[key]}); pass --force to replace them")
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no embeddings; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda partial: partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8"))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    write_beside(path, lambda partial: save_tensors({k: v.cpu().contiguous() for k, v in tensors.items()}, partial))
