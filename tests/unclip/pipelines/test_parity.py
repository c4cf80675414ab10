"""The same weights and the same generator draw the same image as diffusers' deprecated pipelines."""

import json

import karlo
import numpy as np
import pytest
import torch
from conftest import seeds
from PIL import Image

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline

STEPS = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 2}
SENTENCES = ["a teddy", "two red moons", "z"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The deprecated pipeline and ours, loaded from what it saved, both in float64."""
    return loaded(UnCLIPPipeline, tmp_path_factory.mktemp("karlo"))


@pytest.fixture(scope="module")
def variation_pair(tmp_path_factory):
    return loaded(UnCLIPImageVariationPipeline, tmp_path_factory.mktemp("variation"))


def loaded(ours, folder):
    pytest.importorskip("diffusers.pipelines.deprecated.unclip", reason="diffusers has dropped it; golden values remain")
    old = karlo.old(ours.__name__, folder)
    old.save_pretrained(folder / "saved")
    index = json.loads((folder / "saved" / "model_index.json").read_text())
    index["text_proj"] = ["unclip", "UnCLIPTextProjModel"]  # as it stands in Karlo's own
    (folder / "saved" / "model_index.json").write_text(json.dumps(index))
    new = ours.from_pretrained(folder / "saved", dtype=torch.float64)
    old.to(torch.float64)
    new.set_progress_bar_config(disable=True)
    return old, new


def differ(pair, *args, **kwargs) -> float:
    """The largest difference of a pixel in [0, 1]."""
    images = []
    for pipe in pair:
        generator = kwargs["generator"]() if callable(kwargs.get("generator")) else None
        images.append(pipe(*args, **(kwargs | {"generator": generator}), output_type="np").images)
    assert images[0].shape == images[1].shape and images[0].std() > 0.01
    return float(np.abs(images[0] - images[1]).max())


@pytest.mark.parametrize("prior_guidance", [1.0, 4.0, 0.5])
@pytest.mark.parametrize("decoder_guidance", [1.0, 8.0])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("listed", [False, True], ids=["one generator", "a generator each"])
def test_text_to_image(pair, prior_guidance, decoder_guidance, batch, listed):
    found = differ(
        pair,
        SENTENCES[:batch],
        generator=lambda: seeds(*range(batch)) if listed else seeds(5)[0],
        prior_num_inference_steps=3,
        prior_guidance_scale=prior_guidance,
        decoder_guidance_scale=decoder_guidance,
        **STEPS,
    )
    assert found < 1e-6


def test_defaults_and_several_images_a_prompt(pair):
    assert differ(pair, "a ring", num_images_per_prompt=2, generator=lambda: seeds(1)[0]) < 1e-6
    assert differ(pair, SENTENCES[:2], 2, 2, 3, 2, generator=lambda: seeds(3)[0]) < 1e-6


def test_given_latents_and_text(pair):
    g = torch.Generator().manual_seed(1)
    shapes = {"prior": (3, karlo.DIM), "decoder": (3, 3, 16, 16), "super_res": (3, 3, 32, 32)}
    latents = {f"{n}_latents": torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    old = pair[0]
    tokens = old.tokenizer(SENTENCES, padding="max_length", max_length=karlo.TOKENS, truncation=True, return_tensors="pt")
    output = old.text_encoder(tokens.input_ids)
    text = {
        "text_model_output": (output.text_embeds.detach(), output.last_hidden_state.detach()),
        "text_attention_mask": tokens.attention_mask.bool(),
    }
    generator = {"generator": lambda: seeds(2)[0]}
    assert differ(pair, SENTENCES, **latents, **generator, **STEPS) < 1e-6
    assert differ(pair, None, **text, **generator, **STEPS) < 1e-6
    assert differ(pair, None, **latents, **text, **generator, **STEPS) < 1e-6


@pytest.mark.parametrize("guidance", [1.0, 8.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_image_variation(variation_pair, guidance, batch):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)) for _ in range(batch)]
    settings = {"generator": lambda: seeds(4)[0], "decoder_guidance_scale": guidance, **STEPS}
    assert differ(variation_pair, images if batch > 1 else images[0], **settings) < 1e-6
    embeddings = torch.randn(batch, karlo.DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert differ(variation_pair, image_embeddings=embeddings, num_images_per_prompt=2, **settings) < 1e-6
    tensor = torch.rand(batch, 3, 16, 16, dtype=torch.float64)
    assert differ(variation_pair, tensor, **settings) < 1e-6


def test_every_stage_agrees_in_float32(pair):
    """Whole images cannot be compared in float32: random networks amplify rounding."""
    old, new = pair
    g = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, karlo.DIM, generator=g), torch.randn(2, karlo.DIM, generator=g)
    states = torch.randn(2, karlo.TOKENS, karlo.DIM, generator=g)
    mask = torch.arange(karlo.TOKENS)[None] < torch.tensor([[5], [12]])
    try:
        for pipe in pair:
            pipe.to(torch.float32)
        priors = [p.prior(latents, 7, text, states, mask).predicted_image_embedding for p in pair]
        torch.testing.assert_close(*priors, rtol=0, atol=1e-5)
        inputs = {"image_embeddings": latents, "prompt_embeds": text, "text_encoder_hidden_states": states}
        conditions = [p.text_proj(**inputs, do_classifier_free_guidance=False) for p in pair]
        torch.testing.assert_close(*conditions, rtol=0, atol=1e-5)
        context, added = conditions[0]
        seen = torch.nn.functional.pad(mask, (4, 0), value=True)
        image = torch.randn(2, 3, 16, 16, generator=g)
        drawn = [p.decoder(image, 5, context, class_labels=added, attention_mask=seen).sample for p in pair]
        torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)
    finally:
        for pipe in (old, new):
            pipe.to(torch.float64)


@pytest.mark.parametrize("case", karlo.cases())
def test_golden_values(case, tmp_path):
    """What the deprecated pipelines drew when they were last run (`python tests/karlo.py`)."""
    name, arguments = karlo.cases()[case]
    ours = {"UnCLIPPipeline": UnCLIPPipeline, "UnCLIPImageVariationPipeline": UnCLIPImageVariationPipeline}[name]
    have = karlo.parts(tmp_path)
    pipe = ours(**{n: have.get(n) for n in ours.component_names()}).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    golden = json.loads(karlo.GOLDEN.read_text())[case]
    np.testing.assert_allclose(karlo.pixels(pipe, arguments), golden, rtol=0, atol=1e-6)
