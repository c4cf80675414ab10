"""Modules of version 0.1 that moved: old imports and saved class paths work for one more release, with a warning."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> where its names are now. `unclip.clip`, `unclip.diffusion` and `unclip.training` became packages.
MODULES: dict[str, tuple[str, ...]] = {
    "unclip.attention": ("unclip.runtime.attention",),
    "unclip.checkpoints": ("unclip.io.checkpoints", "unclip.runtime.memory"),
    "unclip.cli.pictures": ("unclip.cli.images",),
    "unclip.clip": ("unclip.clip.model", "unclip.clip.towers", "unclip.clip.preprocessing"),
    "unclip.compiling": ("unclip.runtime.compiling",),
    "unclip.config": ("unclip.runtime.config",),
    "unclip.convert": ("unclip.pipelines.convert", "unclip.clip.stock"),
    "unclip.data.pictures": ("unclip.data.captioned_images",),
    "unclip.data.reading": ("unclip.data.image_files",),
    "unclip.data.singles": ("unclip.data.single_icons",),
    "unclip.data.sources": ("unclip.data.icon_packages",),
    "unclip.diffusion": ("unclip.diffusion.predictions", "unclip.diffusion.schedules"),
    "unclip.distilled": ("unclip.pipelines.distilled",),
    "unclip.embed": ("unclip.training.embed",),
    "unclip.evaluation.attached": ("unclip.evaluation.attachment_detector",),
    "unclip.evaluation.bench": ("unclip.evaluation.context",),
    "unclip.evaluation.detector": ("unclip.evaluation.pair_detector",),
    "unclip.evaluation.drawing": ("unclip.evaluation.sample_store",),
    "unclip.evaluation.singles": ("unclip.evaluation.single_concepts",),
    "unclip.export": ("unclip.training.export",),
    "unclip.images": ("unclip.io.images",),
    "unclip.judge": ("unclip.clip.judge",),
    "unclip.latents": ("unclip.diffusion.latents",),
    "unclip.memory": ("unclip.runtime.memory", "unclip.pipelines.residency"),
    "unclip.muon": ("unclip.training.muon",),
    "unclip.objectives": ("unclip.training.objectives",),
    "unclip.objectives.base": ("unclip.training.objectives.base",),
    "unclip.objectives.clip": ("unclip.training.objectives.clip",),
    "unclip.objectives.conditioned": ("unclip.io.pixels", "unclip.training.objectives.conditioned"),
    "unclip.objectives.decoder": ("unclip.training.objectives.decoder",),
    "unclip.objectives.decoder_distill": ("unclip.training.objectives.decoder_distill",),
    "unclip.objectives.frozen_clip": ("unclip.training.objectives.frozen_clip",),
    "unclip.objectives.grounding": ("unclip.training.objectives.grounding",),
    "unclip.objectives.judge": ("unclip.training.objectives.judge",),
    "unclip.objectives.prior": ("unclip.training.objectives.prior",),
    "unclip.objectives.prior_autoregressive": ("unclip.training.objectives.prior_autoregressive",),
    "unclip.objectives.text_proj": ("unclip.training.objectives.text_proj",),
    "unclip.objectives.upsampler": ("unclip.training.objectives.upsampler", "upsamplers.model"),
    "unclip.planning": ("unclip.training.planning", "unclip.training.counting"),
    "unclip.plot": ("unclip.training.plot",),
    "unclip.precision": ("unclip.runtime.precision",),
    "unclip.processes": ("unclip.runtime.processes",),
    "unclip.profiling": ("unclip.runtime.profiling",),
    "unclip.rerank": ("unclip.pipelines.rerank",),
    "unclip.sampling": ("unclip.diffusion.predictions", "unclip.diffusion.guidance", "unclip.diffusion.sampling"),
    "unclip.scheduler": ("unclip.diffusion.scheduler",),
    "unclip.search": ("unclip.clip.search", "unclip.pipelines.axes"),
    "unclip.sharding": ("unclip.training.sharding",),
    "unclip.tiling": ("unclip.diffusion.tiling",),
    "unclip.training": (
        "unclip.training.config",
        "unclip.training.ema",
        "unclip.training.batches",
        "unclip.training.trainer",
    ),
    "unclip.server.drawing": ("unclip.server.work",),
    "unclip.server.guard": ("unclip.server.middleware",),
    "unclip.server.shelf": ("unclip.server.image_store",),
    "unclip.studio.drawing": ("unclip.studio.generation",),
    "unclip.studio.page": (
        "unclip.studio.layout",
        "unclip.studio.handlers",
        "unclip.studio.session",
        "unclip.studio.validation",
    ),
    "unclip.worker": ("unclip.server.worker",),
}

# Classes of this package in place of those that a saved model_index.json names, whatever their module.
CLASSES = {"UnCLIPTextProjModel": "decoder.conditioning", "UnCLIPScheduler": "unclip.diffusion.scheduler"}


# Names that changed as well as their module.
NAMES: dict[str, dict[str, str]] = {
    "unclip.cli.pictures": {"how_it_comes": "install_hint"},
    "unclip.data.pictures": {
        "Opened": "LoadedImage",
        "PictureCrops": "ImageCrops",
        "Pictures": "CaptionedImages",
        "Shuffled": "ShuffledImages",
        "Streamed": "StreamedImages",
        "Unreadable": "UnreadableImages",
        "pixels": "to_uint8",
    },
    "unclip.data.reading": {"Captioned": "CaptionedFiles", "read_pictures": "read_captioned_images"},
    "unclip.attention": {"of_context": "context_kv_cache", "described": "describe"},
    "unclip.convert": {"unwoven": "split_heads"},
    "unclip.diffusion": {"shifted": "offset_x0"},
    "unclip.evaluation.attached": {"AttachedDetector": "AttachmentDetector"},
    "unclip.evaluation.bench": {"Bench": "EvaluationContext", "Impossible": "UnsupportedPart"},
    "unclip.evaluation.detector": {"Detector": "PairDetector"},
    "unclip.evaluation.drawing": {"Gallery": "SampleStore", "Draw": "BatchSampler", "read": "read_images"},
    "unclip.evaluation.singles": {"Singles": "SingleConcepts"},
    "unclip.images": {"towards_square": "limit_aspect_ratio"},
    "unclip.memory": {"at_hand": "onloaded"},
    "unclip.networks": {"told_of_noise": "is_noise_conditioned"},
    "unclip.objectives.conditioned": {"gained": "new_weights", "in_range": "normalize"},
    "unclip.objectives.decoder": {"holes": "inpainting_masks"},
    "unclip.objectives.decoder_distill": {"Lesson": "TeacherTrajectory", "through": "solve_x0_and_noise"},
    "unclip.objectives.grounding": {"mean_over": "mean_over_tokens", "of_two": "names_two", "unlike": "name_distances"},
    "unclip.pipelines.base": {"draws_itself": "is_autoregressive", "pictures_at_once": "images_at_once"},
    "unclip.scheduler": {"own": "replace_stock_unclip"},
    "unclip.sampling": {"clean_from": "predict_x0", "guide": "apply_guidance", "shifted_timesteps": "shift_timesteps"},
    "unclip.server.drawing": {
        "Painting": "GenerationWork",
        "Repainting": "EditWork",
        "Varying": "VariationWork",
        "reduced": "shrink",
    },
    "unclip.server.guard": {"BoundedBody": "BodyLimit", "LetGo": "EndStreamsOnShutdown", "OwnPages": "OriginCheck"},
    "unclip.server.shelf": {"Shelf": "ImageStore"},
    "unclip.sharding": {"whole": "gather_full", "own_part": "local_shard"},
    "unclip.studio.drawing": {"Explored": "Exploration", "Watch": "ProgressCallback", "to_pictures": "to_images"},
    "unclip.studio.page": {
        "MAX_PICTURES": "MAX_IMAGES",
        "MOST": "MAX_BLEND_IMAGES",
        "asker": "client_of",
        "between": "number_between",
        "mistakes": "user_errors",
        "spoken": "readable",
        "to_repaint": "inpainting_inputs",
        "whole": "whole_number",
    },
    "unclip.training": {"Run": "TrainConfig"},
    "unclip.worker": {"Calling": "FunctionWork"},
}


def class_module(module: str, name: str) -> str:
    """The module that holds a class which a saved `model_index.json` names by `module` and `name`."""
    return next((new for new in MODULES.get(module, ()) if hasattr(import_module(new), name)), module)


def attribute(old: str, name: str, modules: Sequence[str] | None = None) -> Any:
    """A name of the old module `old`, from where it is now, with a DeprecationWarning for the caller's caller.

    `modules` are those that may have it now, for an old module that still exists; default: those of `MODULES`. Raises
    AttributeError for a name that no module took over.
    """
    new_name = NAMES.get(old, {}).get(name, name)
    for new in () if name.startswith("__") else modules or MODULES[old]:
        module = import_module(new)
        if new_name in vars(module) or (new != old and hasattr(module, new_name)):
            message = f"{old}.{name} has moved to {new}.{new_name}; the old name will be removed in version 0.3"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
            return getattr(module, new_name)
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


class _MovedModule(ModuleType):
    """Stands in for an old module; its names are looked up where they are now."""

    def __getattr__(self, name: str) -> Any:
        return attribute(self.__name__, name)


class _MovedModules(MetaPathFinder, Loader):
    """Finds old modules by their old names."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in MODULES or MODULES[name][0].startswith(f"{name}."):  # no old module, or a package now
            return None
        return ModuleSpec(name, self, is_package=any(old.startswith(f"{name}.") for old in MODULES))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Let old modules be imported; before all other finders, so that files left over from version 0.1 are not imported."""
    sys.meta_path.insert(0, _MovedModules())
