"""A saved folder is the folder that was loaded: every file, no path of this machine, complete before anything is sent."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unclip import UnCLIPPipeline, UnCLIPPriorPipeline
from unclip.io.checkpoints import make_readable
from unclip.io.hub import AXES_FILE, DISTILLED_FILE
from unclip.pipelines import hub
from unclip.pipelines.distilled import Distilled, fingerprint


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_tensors(one, other):
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        assert first.metadata() == second.metadata() and set(first.keys()) == set(second.keys()), one
        assert all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in first.keys()), one  # noqa: SIM118


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A model's folder with everything that one can hold: a distilled decoder, principal axes and a card."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("whole") / "model")
    pipe = UnCLIPPipeline.from_pretrained(folder, dtype=torch.float32)
    (layer, *_) = (n for n, m in pipe.decoder.named_modules() if isinstance(m, torch.nn.Linear))
    weight = pipe.decoder.get_submodule(layer).weight
    factors = {layer: (torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1))}
    Distilled(factors, 1e-3, 4, 2.0, fingerprint(pipe.decoder)).save(folder / DISTILLED_FILE)
    save_file({"mean": torch.zeros(32), "axes": torch.eye(32)}, folder / AXES_FILE)
    make_readable(folder / AXES_FILE)
    (folder / "README.md").write_text("# A model of 🐸\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_saved_folder_is_the_one_that_was_loaded(whole, tmp_path, low_memory):
    pipe = UnCLIPPipeline.from_pretrained(whole, dtype=torch.float32, low_memory=low_memory)
    pipe.save_pretrained(tmp_path / "saved")
    saved, loaded = contents(tmp_path / "saved"), contents(whole)
    assert saved.keys() == loaded.keys()
    for name in loaded:
        if name.endswith(".json"):
            assert json.loads(saved[name]) == json.loads(loaded[name]), name
        elif name.endswith(".safetensors"):  # their metadata come in any order
            assert_same_tensors(tmp_path / "saved" / name, whole / name)
        else:
            assert saved[name] == loaded[name], name
    assert not [name for name, content in saved.items() if str(whole).encode() in content], "no path of this machine"


def test_it_is_so_where_the_folder_is_gone_or_is_saved_into(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    pipe = UnCLIPPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.save_pretrained(folder)
    assert contents(folder).keys() == contents(whole).keys()
    shutil.rmtree(folder)
    pipe.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again").keys() == contents(whole).keys()


def test_another_kind_of_pipeline_keeps_the_card(whole, tmp_path):
    UnCLIPPriorPipeline.from_pipe(UnCLIPPipeline.from_pretrained(whole)).save_pretrained(tmp_path / "prior")
    assert (tmp_path / "prior" / "README.md").read_bytes() == (whole / "README.md").read_bytes()


def test_axes_of_another_encoder_are_left_out(whole, tmp_path, tiny):
    UnCLIPPipeline.from_pretrained(whole, image_encoder=tiny.image_encoder).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / AXES_FILE).exists() and (tmp_path / "other" / "README.md").exists()


def test_all_is_there_before_anything_is_sent(whole, tmp_path, monkeypatch):
    sent = {}

    def record(folder, repo_id, **options):
        sent.update(contents(folder), repo_id=repo_id, options=options)

    monkeypatch.setattr("unclip.pipelines.loading.push_folder", record)
    pipe = UnCLIPPipeline.from_pretrained(whole, dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/model", private=True)
    assert sent.pop("repo_id") == "someone/model" and sent.pop("options") == {"private": True}
    assert sent == contents(tmp_path / "saved") and {DISTILLED_FILE, AXES_FILE, "README.md"} <= sent.keys()
    assert load_file(tmp_path / "saved" / AXES_FILE)["axes"].shape == (32, 32)


@pytest.mark.parametrize("path", ["/home/someone/models/clip", "C:\\Users\\someone\\clip", "~/models/clip"])
def test_a_path_of_this_machine_is_not_sent(whole, tmp_path, path):
    folder = shutil.copytree(whole, tmp_path / "model")
    file = folder / "prior" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": {"clip": path}}))
    with pytest.raises(ValueError, match=r"prior/config.json holds the path .* of this machine"):
        hub.push_folder(folder, "someone/model")
