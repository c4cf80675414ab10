"""Assembling a pipeline folder from the stages' training runs."""

import json
import shutil
from pathlib import Path

import torch

from . import __version__
from .checkpoints import check_folder, components_folder, load_components, new_folder, resolve, save_components
from .clip import PARTS
from .latents import AXES_FILE, PrincipalAxes
from .pipelines import UnCLIPPipeline


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
    replaces single ones; its model card is kept, so is one that stands at `out`, and so are its principal axes if they are
    of this CLIP. Raises ValueError when a part is
    missing or parts don't fit together.
    """
    components, kept, axes, cards = {}, {}, [], [out / "README.md"] if (out / "README.md").is_file() else []
    for run in runs:
        folder = resolve(components_folder(run))
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
        for file in [*cards, *axes]:
            shutil.copy(file, folder)
    return out


def _fingerprint(components: dict) -> str | None:
    return getattr(getattr(components.get("image_encoder"), "config", None), "clip_fingerprint", None)
