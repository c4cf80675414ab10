"""The model that comes with the package."""

import json

import pytest
import torch
from conftest import ROOT

from unclip import CLIP, UnCLIPPipeline

FOLDER = ROOT / "unclip" / "pretrained" / "emoji"


@pytest.fixture(scope="module")
def pipe() -> UnCLIPPipeline:
    loaded = UnCLIPPipeline.from_pretrained("emoji", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_small_and_safe():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    weights = [p for p in files if p.suffix == ".safetensors"]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert max(p.stat().st_size for p in weights) <= 60e6
    assert sum(p.stat().st_size for p in weights) <= 150e6


def test_its_defaults_come_with_it(pipe):
    assert json.loads((FOLDER / "model_index.json").read_text())["defaults"] == pipe.config.defaults
    assert pipe.config.defaults["prior_candidates"] == 2
    assert pipe.sizes == [64, 256, 1024]


def test_its_card_names_data_licences_and_limits():
    card = (FOLDER / "README.md").read_text()
    for word in ("Noto Emoji", "Apache-2.0", "Fluent UI Emoji", "MIT", "Twemoji", "CC BY 4.0", "MiniLM", "Limits"):
        assert word in card


def test_its_clip_knows_words_that_no_caption_held():
    clip = CLIP.from_pretrained("emoji")
    pairs = [("a kitty", "a cat"), ("an automobile", "a car"), ("a tiny infant", "a baby")]
    for unusual, usual in pairs:
        texts = clip.encode_text([unusual, usual, "a blue square", "a trumpet", "a bowl of rice"])
        assert (texts[0] @ texts[1:].T).argmax() == 0


NAMES = ["pizza", "rocket", "rose", "banana", "octopus", "light bulb"]


@pytest.fixture(scope="module")
def drawing(pipe) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images of six plain concepts, and what a callback was given in the middle of the decoder's steps."""
    middle = {}

    def note(p, step, timestep, given):
        if p.stage == "decoder" and step == p.num_timesteps // 2:
            middle.update(given)
        return {}

    inputs = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"]}
    generators = [torch.Generator().manual_seed(0) for _ in NAMES]
    return pipe(NAMES, generator=generators, size=64, output_type="pt", **inputs).images, middle


def test_it_draws_what_it_is_told(drawing):
    """Each image is nearer to its own name than to the others', at least five times of six."""
    clip = CLIP.from_pretrained("emoji")
    scores = clip.encode_image(drawing[0]) @ clip.encode_text(NAMES).T
    assert (scores.argmax(1) == torch.arange(6)).sum() >= 5


def test_the_image_is_expected_long_before_it_is_clean(drawing):
    images, middle = drawing
    off = {name: (tensor / 2 + 0.5 - images).square().mean().sqrt() for name, tensor in middle.items()}
    assert off["pred_original_sample"] < 0.15 and off["latents"] > 3 * off["pred_original_sample"], off
