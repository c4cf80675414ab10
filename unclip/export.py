"""Assembling a pipeline folder from the stages' training runs."""

import json
import logging
import shutil
from pathlib import Path

import torch

from . import __version__
from .checkpoints import check_folder, components_folder, load_components, new_folder, resolve, save_components
from .clip import PARTS
from .distilled import FILE as DISTILLED
from .distilled import Distilled, fingerprint
from .latents import AXES_FILE, PrincipalAxes
from .pipelines import UnCLIPPipeline

logger = logging.getLogger(__name__)


def export_pipeline(
    runs: list[Path],
    out: Path,
    force: bool = False,
    defaults: dict[str, float] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the pipeline that the runs' averaged weights make together, or the CLIP (or judge) alone; -> its folder.

    Each of `runs` is a training run (its `final/`, or `latest/` while it goes on), a folder of components, or another
    pipeline; a component in a later one replaces an earlier one's. A pipeline's sampling defaults are kept, `defaults`
    replaces single ones; its model card is kept, so is one that stands at `out`, so are its principal axes if they are
    of this CLIP, and its distilled decoder if it is this decoder's. Raises ValueError when a part is missing or parts don't
    fit together.
    """
    components, kept, axes, cards = {}, {}, [], [out / "README.md"] if (out / "README.md").is_file() else []
    distilled: Path | None = None
    for run in runs:
        folder = resolve(components_folder(run))
        distilled = folder / DISTILLED if (folder / DISTILLED).is_file() else distilled
        if not (folder / "model_index.json").is_file() and distilled == folder / DISTILLED:
            continue  # a run of decoder_distill leaves nothing else
        index = check_folder(folder)
        names = [k for k, v in index.items() if isinstance(v, list) and v[0] is not None]
        components |= load_components(folder, names, dtype=dtype)
        kept |= index.get("defaults") or {}
        cards = [folder / "README.md"] if (folder / "README.md").is_file() else cards
        axes = [folder / AXES_FILE] if (folder / AXES_FILE).is_file() else axes
    if set(components) == set(PARTS):
        with new_folder(out, force) as folder:
            save_components(folder, components)
        return out
    axes = [path for path in axes if PrincipalAxes.load(path).clip_fingerprint == _fingerprint(components)]
    own = []
    if distilled is not None and "decoder" in components:
        made_for, have = Distilled.load(distilled).decoder, fingerprint(components["decoder"])
        if made_for == have:
            own = [distilled]
        elif not (distilled.parent / "model_index.json").is_file():
            raise ValueError(f"{distilled} was distilled from the decoder {made_for}, but the pipeline's is {have}")
        else:
            logger.warning("the distilled decoder of %s is left out: the full one is another now", distilled.parent)
    settings = kept | (defaults or {}) or None
    components = {"super_res_last": None, "prior_scheduler": None} | components
    required = [n for n in UnCLIPPipeline.required_components() if n not in components]
    if required:
        raise ValueError(f"no run holds the {required[0]}; a pipeline needs {', '.join(UnCLIPPipeline.required_components())}")
    with new_folder(out, force) as folder:
        UnCLIPPipeline(**components, defaults=settings).save_pretrained(folder)
        index_path = folder / "model_index.json"
        index = json.loads(index_path.read_text()) | {"defaults": settings, "_unclip_version": __version__}
        index_path.write_text(json.dumps(index, indent=2) + "\n")
        for file in [*cards, *axes, *own]:
            shutil.copy(file, folder)
    return out


def _fingerprint(components: dict) -> str | None:
    return getattr(getattr(components.get("image_encoder"), "config", None), "clip_fingerprint", None)
