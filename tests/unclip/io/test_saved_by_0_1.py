"""A model and runs that version 0.1 saved (tests/fixtures/v0_1): they load, sample, and go on as they would have there."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from unclip import CLIP, UnCLIPPipeline
from unclip.training.trainer import train

SAVED = ROOT / "tests" / "fixtures" / "v0_1"
STORED = json.loads((SAVED / "losses.json").read_text())


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    return [row["loss"] for row in rows]


@pytest.fixture(autouse=True)
def no_deprecation_of_ours():
    """Loading what an old version saved is no use of an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "unclip", DeprecationWarning)
        yield


def test_the_model_samples_the_same_image(command, tmp_path):
    words = ["--model", SAVED / "model", "--size", 64, "--seed", 0, "--dtype", "fp32", "--device", "cpu"]
    code, _, error = command("generate", "a red star", *words, "--out", tmp_path / "star.png")
    assert code == 0, error
    with Image.open(tmp_path / "star.png") as found, Image.open(SAVED / "image.png") as stored:
        assert found.size == (64, 64)
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(stored, float), rtol=0, atol=1)


def test_another_seed_samples_another_image():
    pipe = UnCLIPPipeline.from_pretrained(SAVED / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    found = pipe("a red star", size=64, generator=torch.Generator().manual_seed(1)).images[0]
    with Image.open(SAVED / "image.png") as stored:
        assert np.abs(np.asarray(found, float) - np.asarray(stored, float)).max() > 10


def test_every_component_has_a_class_of_this_version():
    """And reaches 256 pixels, and ranks images with the CLIP of the folder."""
    pipe = UnCLIPPipeline.from_pretrained(SAVED / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = {
        n for n, v in json.loads((SAVED / "model" / "model_index.json").read_text()).items() if isinstance(v, list) and v[0]
    }
    assert names == {name for name, part in pipe.components.items() if part is not None}
    assert type(pipe.prior_scheduler).__module__ == "unclip.diffusion.scheduler"
    assert pipe("a red star", size=256).images[0].size == (256, 256)
    clip = CLIP.from_pretrained(SAVED / "model")
    assert clip.encode_text(["a red star"]).shape == (1, 8)


@pytest.fixture
def resumed(tmp_path):
    """call(stage, saved) -> the folder of a run of 0.1, gone on with to its end."""

    def call(stage: str, saved: Path) -> Path:
        folder = shutil.copytree(saved, tmp_path / stage)
        train(SAVED / f"{stage}.yaml", [f"objective.clip={SAVED / 'model'}", f"output_dir={folder}"])
        return folder

    return call


@pytest.mark.parametrize("stage", ["decoder", "prior"])
def test_a_run_goes_on_with_the_losses_of_0_1(resumed, stage):
    folder = resumed(stage, SAVED / stage)
    np.testing.assert_allclose(losses_of(folder), STORED[stage], rtol=1e-4, atol=0)
    assert (folder / "final" / "model_index.json").is_file()


def test_a_run_without_its_moments_would_lose_otherwise(resumed, tmp_path):
    """The losses above tell of the optimizer's state too."""
    saved = shutil.copytree(SAVED / "decoder", tmp_path / "without" / "decoder") / "checkpoint-00000004"
    moments = {
        k: v if k.endswith(".step") else torch.zeros_like(v) for k, v in load_file(saved / "optimizer.safetensors").items()
    }
    save_file(moments, saved / "optimizer.safetensors")
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["optimizer.safetensors"] = hashlib.sha256((saved / "optimizer.safetensors").read_bytes()).hexdigest()
    (saved / "manifest.json").write_text(json.dumps(manifest))
    losses = losses_of(resumed("decoder", saved.parent))
    assert not np.allclose(losses, STORED["decoder"], rtol=1e-3, atol=0)
