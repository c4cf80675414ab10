"""Sharing by the Hub's own client over HTTP, with a local stand-in for the Hub: whole models or none, and back again."""

import json
import os
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
import yaml
from conftest import ROOT, seeds
from fake_hub import TOKEN, FakeHub
from PIL import Image
from running import run_here

from unclip import UnCLIPPipeline
from unclip.io.hub import AXES_FILE, CARD
from unclip.pipelines.hub import push_folder
from unclip.pipelines.model_card import CardFacts
from unclip.runtime.config import ConfigError

REPO = "someone/circles"
CLIENT = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The stand-in, which this process's client asks."""
    with FakeHub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sample(pipe) -> torch.Tensor:
    return pipe("a red circle", generator=seeds(0), size=64, output_type="pt").images


@pytest.fixture
def model(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / CARD).write_text("---\nlicense: mit\n---\n# Circles\n")
    return folder


def test_what_was_pushed_samples_the_same_image(fake, model, tmp_path):
    pipe = UnCLIPPipeline.from_pretrained(model, dtype=torch.float32)
    address = pipe.push_to_hub(REPO, private=True)
    assert address.startswith(f"{fake.url}/{REPO}/commit/") and fake.repositories[REPO]["private"]
    assert fake.files(REPO).keys() == contents(model).keys()
    assert len(fake.repositories[REPO]["branches"]["main"]) == 2, "one commit on the empty first one"
    again = UnCLIPPipeline.from_pretrained(REPO, dtype=torch.float32)
    assert torch.equal(sample(again), sample(pipe))
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again").keys() == contents(model).keys(), "the card too came back"


def test_variant_revision_and_subfolder(fake, model, tmp_path):
    pipe = UnCLIPPipeline.from_pretrained(model, dtype=torch.float16)
    pipe.push_to_hub(REPO)
    pipe.push_to_hub(REPO, variant="fp16", revision="half", subfolder="small")
    assert not any("fp16" in name for name in fake.files(REPO))
    again = UnCLIPPipeline.from_pretrained(REPO, variant="fp16", revision="half", subfolder="small", dtype=torch.float32)
    assert torch.equal(sample(again), sample(pipe.to(torch.float32)))
    fetched = {p.name for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert fetched and all(".fp16." in name for name in fetched), "the weights of other variants are not fetched"
    local = UnCLIPPipeline.from_pretrained(model.parent, subfolder="model", dtype=torch.float32)
    assert torch.equal(sample(local), sample(UnCLIPPipeline.from_pretrained(model, dtype=torch.float32)))


def test_a_connection_that_breaks_is_tried_again(fake, model):
    def break_second(number: int) -> None:
        if number == 2:
            raise ConnectionResetError

    fake.before_put = break_second
    push_folder(model, REPO)
    assert fake.files(REPO) == contents(model)


def test_killed_in_the_middle_nothing_is_there_and_the_next_push_goes_on(fake, model):
    process = None

    def kill(number: int) -> None:
        if number >= 3:  # of several that come at the same time
            while not fake.objects:
                time.sleep(0.01)
            process.kill()
            raise ConnectionResetError

    fake.before_put = kill
    command = [sys.executable, "-m", "unclip", "push", str(model), REPO]
    environment = {**os.environ, **CLIENT, "HF_ENDPOINT": fake.url, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=300)
    assert fake.puts >= 3, said
    assert fake.files(REPO) == {} and len(fake.objects) > 0
    before, fake.puts, fake.before_put = set(fake.objects), 0, lambda number: None
    push_folder(model, REPO)
    assert fake.files(REPO) == contents(model)
    assert 0 < fake.puts <= len(fake.objects) - len(before), "what had arrived is not sent again"


@pytest.mark.parametrize("change", ["incomplete", "unauthorised"])
def test_what_cannot_be_sent_is_one_line(fake, model, monkeypatch, change):
    if change == "incomplete":
        (model / "prior" / "diffusion_pytorch_model.safetensors").unlink()
        expected = "prior holds no weights"
    else:
        monkeypatch.setenv("HF_TOKEN", "another")
        expected = f"could not be sent to {REPO}: .*401"
    with pytest.raises(ValueError, match=expected) as caught:
        push_folder(model, REPO)
    assert "\n" not in str(caught.value) and fake.puts == 0 and REPO not in fake.repositories


def test_a_folder_without_a_card_gets_one(fake, tiny_folder, tmp_path):
    summary = [{"metric": "accuracy", "value": {"value": 0.875, "low": 0.8, "high": 0.9, "n": 40}, "images": 40}]
    (tmp_path / "report.json").write_text(json.dumps({"command": "unclip evaluate", "summary": summary}))
    images = {"a red | circle": Image.new("RGB", (64, 64), "red"), "two\nsquares": Image.new("RGB", (64, 64), "blue")}
    push_folder(tiny_folder, REPO, facts=CardFacts("apache-2.0", "Plain shapes.", images, tmp_path))
    files = fake.files(REPO)
    header, text = files[CARD].decode().removeprefix("---\n").split("---\n", 1)
    metadata = yaml.safe_load(header)
    assert metadata["license"] == "apache-2.0" and metadata["pipeline_tag"] == "text-to-image"
    assert metadata["widget"][0] == {"text": "a red | circle", "output": {"url": "images/0.png"}}
    assert (
        "Plain shapes." in text
        and "| accuracy | 0.875 (0.8 to 0.9) | 40 |" in text
        and "| `prior` | `DiffusionPrior` |" in text
    )
    assert f'from_pretrained("{REPO}")' in text and {"images/0.png", "images/1.png"} <= files.keys()
    assert not (tiny_folder / CARD).exists(), "the folder itself is left as it is"
    bare = CardFacts()
    push_folder(tiny_folder, "someone/bare", facts=bare)
    assert "widget" not in fake.files("someone/bare")[CARD].decode() and AXES_FILE not in fake.files("someone/bare")


def test_facts_for_a_card_that_is_there_are_refused(fake, model):
    with pytest.raises(ValueError, match=r"README.md is there: remove it"):
        push_folder(model, REPO, facts=CardFacts(license="mit"))


def test_the_command(fake, command, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    code, said, complaint = command("push", folder, REPO, "--private", "--prompt", "a star", "--license", "mit")
    assert code == 0, complaint
    assert said.startswith(f"{fake.url}/{REPO}/commit/") and fake.repositories[REPO]["private"]
    assert {CARD, "images/0.png", "model_index.json"} <= fake.files(REPO).keys()
    code, _, complaint = command("push", tmp_path / "nowhere", REPO)
    assert code == 2 and complaint.strip() == f"error: {tmp_path / 'nowhere'} is no folder"


def test_a_finished_run_is_sent(fake, tmp_path, capsys, monkeypatch):
    settings = ("max_steps=1", f"push_to_hub={REPO}")
    run_here("upsampler_256", tmp_path / "run", *settings)
    assert fake.files(REPO).keys() - {CARD} == contents(tmp_path / "run" / "final").keys()
    assert "One stage of an unCLIP" in fake.files(REPO)[CARD].decode()
    assert f"sent: {fake.url}/{REPO}/commit/" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "another")
    run_here("upsampler_256", tmp_path / "other", "max_steps=1", "push_to_hub=someone/other")
    said = capsys.readouterr().err
    assert f"to try again: unclip push {tmp_path / 'other' / 'final'} someone/other" in said and "Traceback" not in said
    assert (tmp_path / "other" / "final").is_dir()


def test_a_name_that_the_hub_cannot_have_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="push_to_hub must be OWNER/NAME, got 'circles'"):
        run_here("upsampler_256", tmp_path / "run", "push_to_hub=circles")
