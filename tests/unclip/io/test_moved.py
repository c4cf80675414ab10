"""Old module names: imports and saved class paths of version 0.1."""

import json
import shutil
import warnings
from importlib import import_module

import pytest

from unclip import UnCLIPPipeline
from unclip.io.checkpoints import load_components
from unclip.io.moved import CLASSES, MODULES, class_module
from unclip.io.moved import NAMES as NEW_NAMES

NAMES = {
    "unclip.attention": "attention",
    "unclip.checkpoints": "load_components",
    "unclip.cli.pictures": "output_files",
    "unclip.clip": "PARTS",
    "unclip.compiling": "compiled",
    "unclip.config": "load_config",
    "unclip.convert": "convert_karlo",
    "unclip.data.pictures": "Pictures",
    "unclip.data.reading": "read_pictures",
    "unclip.data.singles": "SingleIcons",
    "unclip.data.sources": "SOURCES",
    "unclip.diffusion": "dpm_solver",
    "unclip.distilled": "Distilled",
    "unclip.embed": "embed",
    "unclip.evaluation.attached": "AttachedDetector",
    "unclip.evaluation.bench": "Bench",
    "unclip.evaluation.detector": "Detector",
    "unclip.evaluation.drawing": "Gallery",
    "unclip.evaluation.singles": "Singles",
    "unclip.export": "export_pipeline",
    "unclip.images": "open_image",
    "unclip.judge": "Judge",
    "unclip.latents": "slerp",
    "unclip.memory": "out_of_memory",
    "unclip.muon": "Muon",
    "unclip.objectives": "create",
    "unclip.objectives.prior": "PriorObjective",
    "unclip.planning": "plan",
    "unclip.plot": "plot",
    "unclip.precision": "best_device",
    "unclip.processes": "together",
    "unclip.profiling": "Profile",
    "unclip.rerank": "rerank",
    "unclip.sampling": "denoise",
    "unclip.scheduler": "UnCLIPScheduler",
    "unclip.search": "Index",
    "unclip.sharding": "Shards",
    "unclip.tiling": "tiled",
    "unclip.training": "train",
    "unclip.server.drawing": "Painting",
    "unclip.server.guard": "OwnPages",
    "unclip.server.shelf": "Shelf",
    "unclip.studio.drawing": "Studio",
    "unclip.studio.page": "Page",
    "unclip.worker": "Worker",
}
SPLIT = {  # modules whose names went to several
    ("unclip.checkpoints", "readable_size"): "unclip.runtime.memory",
    ("unclip.clip", "mean_over_tokens"): "unclip.clip.towers",
    ("unclip.convert", "clip_text"): "unclip.clip.stock",
    ("unclip.memory", "Residency"): "unclip.pipelines.residency",
    ("unclip.objectives.upsampler", "resize"): "upsamplers.model",
    ("unclip.planning", "LiveBytes"): "unclip.training.counting",
    ("unclip.search", "axes_of"): "unclip.pipelines.axes",
    ("unclip.studio.page", "caption"): "unclip.studio.session",
    ("unclip.studio.page", "restored"): "unclip.studio.validation",
}
RENAMED = {
    ("unclip.sampling", "clean_from"): "unclip.diffusion.predictions.predict_x0",
    ("unclip.sampling", "guide"): "unclip.diffusion.guidance.apply_guidance",
    ("unclip.diffusion", "shifted"): "unclip.diffusion.predictions.offset_x0",
    ("unclip.objectives.conditioned", "in_range"): "unclip.io.pixels.normalize",
    ("unclip.sharding", "whole"): "unclip.training.sharding.gather_full",
    ("unclip.training", "Run"): "unclip.training.config.TrainConfig",
    ("unclip.attention", "of_context"): "unclip.runtime.attention.context_kv_cache",
    ("unclip.convert", "unwoven"): "unclip.pipelines.convert.split_heads",
    ("unclip.images", "towards_square"): "unclip.io.images.limit_aspect_ratio",
    ("unclip.memory", "at_hand"): "unclip.runtime.memory.onloaded",
    ("unclip.scheduler", "own"): "unclip.diffusion.scheduler.replace_stock_unclip",
}


@pytest.mark.parametrize("old", NAMES)
def test_an_old_import_works_and_its_warning_names_the_new_one(old):
    name = NAMES[old]
    with pytest.warns(DeprecationWarning, match=rf"^{old}\.{name} has moved to unclip\.") as caught:
        found = getattr(import_module(old), name)
    new = caught[0].message.args[0].split(" has moved to ")[1].split(";")[0]
    module, _, new_name = new.rpartition(".")
    assert found is getattr(import_module(module), new_name)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("old", "name"), SPLIT)
def test_a_name_that_left_its_module_is_found(old, name):
    new = SPLIT[old, name]
    with pytest.warns(DeprecationWarning):
        found = getattr(import_module(old), name)
    assert found is getattr(import_module(new), name) and found.__module__ == new


@pytest.mark.parametrize(("old", "name"), RENAMED)
def test_a_renamed_name_is_found(old, name):
    module, now = RENAMED[old, name].rsplit(".", 1)
    with pytest.warns(DeprecationWarning, match=rf"^{old}\.{name} has moved to {module}\.{now};"):
        found = getattr(import_module(old), name)
    assert found is getattr(import_module(module), now)


def test_every_old_module_is_tried():
    assert {old for old in MODULES if not old.startswith("unclip.objectives.")} == {
        old for old in NAMES if not old.startswith("unclip.objectives.")
    }
    for modules in MODULES.values():
        for module in modules:
            import_module(module)


def test_an_old_module_has_no_names_that_it_never_had():
    with pytest.raises(AttributeError, match="'unclip.muon' has no attribute 'Adam'"):
        import_module("unclip.muon").Adam  # noqa: B018
    with pytest.raises(AttributeError, match="'unclip.training' has no attribute 'Adam'"):
        import_module("unclip.training").Adam  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="unclip.nothing"):
        import_module("unclip.nothing")


def test_new_imports_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from unclip.clip import CLIP, ImageTower, TextTower  # noqa: F401
        from unclip.diffusion.scheduler import UnCLIPScheduler  # noqa: F401
        from unclip.training.trainer import train  # noqa: F401


@pytest.mark.parametrize(("old", "name"), [("unclip.clip", "TextTower"), ("unclip.judge", "JudgeTextTower")])
def test_saved_class_paths_lead_to_the_class(old, name):
    found = getattr(import_module(class_module(old, name)), name)
    assert found.__module__ == class_module(old, name) != old
    assert class_module("diffusers", "DDIMScheduler") == "diffusers"
    assert all(hasattr(import_module(module), name) for name, module in CLASSES.items())


def test_a_model_saved_by_version_0_1_loads_without_a_warning(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    before = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    index |= {"text_encoder": ["unclip.clip", "TextTower"], "image_encoder": ["unclip.clip", "ImageTower"]}
    index |= {"prior_scheduler": ["unclip.scheduler", "UnCLIPScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "prior_scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "UnCLIPScheduler"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        pipe = UnCLIPPipeline.from_pretrained(folder)
        parts = load_components(folder, ["text_encoder", "prior_scheduler"])
    for part in (pipe.text_encoder, parts["text_encoder"]):
        assert [type(part).__module__, type(part).__name__] == before["text_encoder"]
    for part in (pipe.prior_scheduler, parts["prior_scheduler"]):
        assert type(part).__module__ == "unclip.diffusion.scheduler"


def test_every_renamed_name_is_there_and_every_old_one_is_gone():
    for old, names in NEW_NAMES.items():
        for name, new_name in names.items():
            with pytest.warns(DeprecationWarning, match=rf"^{old}\.{name} has moved to \S+\.{new_name};"):
                getattr(import_module(old), name)
