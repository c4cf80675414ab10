"""The weights that `sprint.py` writes: float16, in a few files of bounded size."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unclip.io.checkpoints import save_tensors

SHARDS, SHARD_BYTES, HEADER = 7, 15 * 2**20, 2**17  # the header of a file, at most


def write_shards(folder: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any], step: int) -> int:
    """Replace the weights in `folder` by these, in float16; -> the number of files.

    They are written beside and moved into place together. Raises ValueError where they do not fit.
    """
    halves = {n: (t.to(torch.float16) if t.is_floating_point() else t).cpu().contiguous() for n, t in weights.items()}
    parts = _shared_out(halves)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    about = {"step": str(step), "shards": str(len(parts)), "settings": json.dumps(settings)}
    for number, names in enumerate(parts):
        save_tensors({n: halves[n] for n in names}, partial / f"shard-{number}.safetensors", about)
    for old in folder.glob("shard-*.safetensors"):
        if int(old.stem.split("-")[1]) >= len(parts):
            old.unlink()
    for file in sorted(partial.iterdir()):
        file.replace(folder / file.name)
    partial.rmdir()
    return len(parts)


def _shared_out(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each file, the largest first wherever there is room."""
    parts: list[list[str]] = []
    sizes: list[int] = []
    for name in sorted(weights, key=lambda n: (weights[n].nbytes, n), reverse=True):
        size = weights[name].nbytes
        at = next((n for n, s in enumerate(sizes) if s + size <= SHARD_BYTES - HEADER), len(parts))
        if at == len(parts):
            parts.append([])
            sizes.append(0)
        parts[at].append(name)
        sizes[at] += size
    if len(parts) > SHARDS or max(sizes) > SHARD_BYTES - HEADER:
        raise ValueError(f"{sum(sizes) / 2**20:.0f} MiB of weights do not fit into {SHARDS} files of {SHARD_BYTES >> 20} MiB")
    return parts


def read_shards(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the settings that `write_shards` wrote. Raises ValueError where files are missing or of two saves."""
    files, weights, about = sorted(folder.glob("shard-*.safetensors")), {}, []
    for file in files:
        with safe_open(file, "pt") as opened:
            about.append(opened.metadata())
        weights |= load_file(file)
    if not files or any(a != about[0] for a in about) or len(files) != int(about[0]["shards"]):
        raise ValueError(f"{folder} does not hold all files of one save")
    return weights, json.loads(about[0]["settings"])


def merge(folder: Path, out: Path, model: str | None = None) -> None:
    """Make a folder of components, which `unclip export` takes, of the weights in `folder`.

    `model` holds the CLIP that they were trained with; None is the one that was packed.
    """
    from unclip.training.objectives import create

    weights, settings = read_shards(folder)
    sections = {name: settings["config"].get(name) or {} for name in ("model", "data", "objective")}
    model = model or settings["model"]
    sections["objective"] |= {"clip": model} | ({"prior": model} if sections["objective"].get("prior") else {})
    objective = create(settings["stage"], sections, settings["config"].get("seed", 0))
    objective.trained.load_state_dict({name: weight.float() for name, weight in weights.items()})
    objective.write(out)
    print(f"{out}: {', '.join(objective.components())}")
