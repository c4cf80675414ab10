"""Assembling a pipeline folder from the stages' training runs."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prior.storage import Int8Storage, store_in_8_bits

from .. import __version__
from ..clip.model import PARTS
from ..diffusion.latents import PrincipalAxes
from ..io.checkpoints import (
    check_folder,
    components_folder,
    load_components,
    make_readable,
    new_folder,
    resolve,
    save_components,
)
from ..io.hub import AXES_FILE, DISTILLED_FILE
from ..pipelines import UnCLIPPipeline
from ..pipelines.distilled import Distilled, fingerprint

STORAGES = ("fp16", "int8")
logger = logging.getLogger(__name__)


def export_pipeline(
    runs: list[Path],
    out: Path,
    force: bool = False,
    defaults: dict[str, float] | None = None,
    dtype: torch.dtype = torch.float16,
    mean: list[str] | None = None,
    storage: str = "fp16",
) -> Path:
    """Write the pipeline that the runs' averaged weights make together, or the CLIP (or judge) alone; -> its folder.

    Each of `runs` is a training run (its `final/`, or `latest/` while it goes on), a folder of components, or another
    pipeline; a component in a later one replaces an earlier one's, or is the mean of all of them where `mean` names it (a
    "model soup", arXiv 2203.05482: of runs that began at the same weights). A pipeline's sampling defaults are kept,
    `defaults` replaces single ones; its model card is kept, so is one that stands at `out`, so are its principal axes if
    they are of this CLIP, and its distilled decoder if it is this decoder's. `storage` "int8" keeps this package's own
    networks in 8 bits (`prior.storage`), which every `from_pretrained` reads. Raises ValueError when a part is missing,
    parts don't fit together, or there are no two of one shape to take the mean of.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be {' or '.join(STORAGES)}, got {storage!r}")
    several: dict[str, list[nn.Module]] = {name: [] for name in mean or ()}
    components: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    axes: list[Path] = []
    cards = [out / "README.md"] if (out / "README.md").is_file() else []
    distilled: Path | None = None
    for run in runs:
        folder = resolve(components_folder(run))
        distilled = folder / DISTILLED_FILE if (folder / DISTILLED_FILE).is_file() else distilled
        if not (folder / "model_index.json").is_file() and distilled == folder / DISTILLED_FILE:
            continue  # a run of decoder_distill leaves nothing else
        index = check_folder(folder)
        names = [k for k, v in index.items() if isinstance(v, list) and v[0] is not None]
        components |= load_components(folder, [n for n in names if n not in several], dtype=dtype)
        for name, network in load_components(folder, [n for n in names if n in several], dtype=torch.float32).items():
            several[name].append(network)
        kept |= index.get("defaults") or {}
        cards = [folder / "README.md"] if (folder / "README.md").is_file() else cards
        axes = [folder / AXES_FILE] if (folder / AXES_FILE).is_file() else axes
    components |= {name: nn.Module.to(_mean(name, networks), dtype) for name, networks in several.items()}
    if set(components) == set(PARTS):
        with new_folder(out, force) as folder:
            save_components(folder, components)
            if storage == "int8":
                _quantise(folder, components)
        return out
    axes = [path for path in axes if PrincipalAxes.load(path).clip_fingerprint == _fingerprint(components)]
    own = _fitting_distilled(distilled, components)
    settings = kept | (defaults or {}) or None
    components = {"super_res_last": None, "prior_scheduler": None} | components
    required = [n for n in UnCLIPPipeline.required_components() if n not in components]
    if required:
        raise ValueError(f"no run holds the {required[0]}; a pipeline needs {', '.join(UnCLIPPipeline.required_components())}")
    with new_folder(out, force) as folder:
        UnCLIPPipeline(**components, defaults=settings).save_pretrained(folder)
        index_path = folder / "model_index.json"
        index = json.loads(index_path.read_text(encoding="utf-8")) | {"defaults": settings, "_unclip_version": __version__}
        index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in [*cards, *axes, *own]:
            shutil.copy(file, folder)
        if storage == "int8":
            _quantise(folder, components)
    return out


def _fitting_distilled(distilled: Path | None, components: dict[str, Any]) -> list[Path]:
    """The distilled decoder's file, if it is of the pipeline's decoder; left out of a pipeline whose decoder was replaced.

    Raises ValueError for a run's that was distilled from another decoder.
    """
    if distilled is None or "decoder" not in components:
        return []
    made_for, have = Distilled.load(distilled).decoder, fingerprint(components["decoder"])
    if made_for == have:
        return [distilled]
    if not (distilled.parent / "model_index.json").is_file():
        raise ValueError(f"{distilled} was distilled from the decoder {made_for}, but the pipeline's is {have}")
    logger.warning("the distilled decoder of %s is left out: the full one is another now", distilled.parent)
    return []


def _quantise(folder: Path, components: dict) -> None:
    """Rewrite the files of this package's own networks in 8 bits; a distilled decoder is that of the rounded weights."""
    for name, component in components.items():
        if isinstance(component, Int8Storage):
            for file in (folder / name).glob("*.safetensors"):
                store_in_8_bits(file)
                make_readable(file)
    if (folder / DISTILLED_FILE).is_file():
        distilled = Distilled.load(folder / DISTILLED_FILE)
        distilled.decoder = fingerprint(type(components["decoder"]).from_pretrained(folder / "decoder"))
        distilled.save(folder / DISTILLED_FILE)


def _mean(name: str, networks: list[nn.Module]) -> nn.Module:
    """The last of `networks`, with the mean of their weights."""
    if len(networks) < 2:
        raise ValueError(f"the mean of {name} needs two runs that hold one, got {len(networks)}")
    states = [n.state_dict() for n in networks if isinstance(n, nn.Module)]
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in states]
    if len(states) < len(networks) or any(s != shapes[0] for s in shapes):
        raise ValueError(f"the mean of {name} needs networks of the same shape")
    mean = {key: torch.stack([s[key].double() for s in states]).mean(0) for key in shapes[0]}
    networks[-1].load_state_dict(mean)
    return networks[-1]


def _fingerprint(components: dict) -> str | None:
    return getattr(getattr(components.get("image_encoder"), "config", None), "clip_fingerprint", None)
