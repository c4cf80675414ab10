"""Text to image through the public call."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY_DEFAULTS, seeds, tiny_networks
from PIL import Image

from unclip import UnCLIPPipeline, UnCLIPPriorPipeline


def test_batch_equals_one_by_one(tiny):
    tiny.to(torch.float64)
    prompts = ["a red circle", "two squares"]
    whole = tiny(prompts, generator=seeds(3, 4), output_type="pt", size=256).images
    alone = [tiny(p, generator=seeds(s), output_type="pt", size=256).images for p, s in zip(prompts, (3, 4), strict=True)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-9)
    several = tiny(prompts, num_images_per_prompt=2, generator=seeds(3, 5, 6, 4), output_type="pt", size=256).images
    torch.testing.assert_close(several[[0, 3]], whole, rtol=0, atol=1e-9)


def test_one_seed_one_image_and_another_seed_another(tiny):
    a, b, c = (tiny("a star", generator=seeds(s), output_type="np", size=64).images for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_saved_equals_loaded(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "copy")
    again = UnCLIPPipeline.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    images = [p("a star", generator=seeds(0), output_type="pt").images for p in (tiny, again)]
    assert torch.equal(*images)


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_sizes_and_stages_past_them_do_not_run(tiny, size, monkeypatch):
    ran = []
    for name in ("super_res_first", "upsampler_1024"):
        network = getattr(tiny, name)
        network.register_forward_hook(lambda *_, name=name: ran.append(name))
    image = tiny("a ring", generator=seeds(0), size=size).images[0]
    assert isinstance(image, Image.Image) and image.size == (size, size)
    assert set(ran) == {64: set(), 256: {"super_res_first"}, 1024: {"super_res_first", "upsampler_1024"}}[size]


def test_the_default_size_is_the_largest(tiny):
    assert tiny("a ring").images[0].size == (1024, 1024)
    tiny.upsampler_1024 = None
    assert tiny("a ring").images[0].size == (256, 256)


def test_output_types_agree(tiny):
    pil, array, tensor = (tiny("a ring", generator=seeds(0), size=64, output_type=t).images for t in ("pil", "np", "pt"))
    assert tensor.shape == (1, 3, 64, 64) and tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    assert np.array_equal(tiny("a ring", generator=seeds(0), size=64, output_type="np", return_dict=False)[0], array)


def test_the_checkpoints_own_defaults_are_used_and_overridden(tiny):
    kwargs = {"size": 64, "output_type": "pt"}
    stated = {k: v for k, v in TINY_DEFAULTS.items() if not k.startswith(("super", "upsampler"))}
    silent = tiny("a ring", generator=seeds(0), **kwargs).images
    assert torch.equal(tiny("a ring", generator=seeds(0), **stated, **kwargs).images, silent)
    for name, value in (("decoder_guidance_scale", 1.0), ("prior_candidates", 1), ("decoder_num_inference_steps", 5)):
        assert not torch.equal(tiny("a ring", generator=seeds(0), **{name: value}, **kwargs).images, silent)


def test_text_output_in_place_of_a_prompt(tiny):
    tokens = tiny.tokenizer(["a star"], padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    output = tiny.text_encoder(tokens.input_ids, tokens.attention_mask)
    given = tiny(
        text_model_output=(output.text_embeds, output.last_hidden_state),
        text_attention_mask=tokens.attention_mask,
        generator=seeds(0),
        size=64,
        output_type="pt",
    ).images
    torch.testing.assert_close(given, tiny("a star", generator=seeds(0), size=64, output_type="pt").images)


def test_text_output_may_be_padded_to_another_length(tiny):
    """As a tokenizer pads by itself: to the longest of a batch, and not to all that CLIP takes."""
    texts = ["a star", "two red rings"]
    tokens = tiny.tokenizer(texts, padding=True, return_tensors="pt")
    assert tokens.input_ids.shape[1] < tiny.tokenizer.model_max_length
    output = tiny.text_encoder(tokens.input_ids, tokens.attention_mask)
    settings = {"size": 64, "output_type": "pt"}
    given = tiny(
        text_model_output=(output.text_embeds, output.last_hidden_state),
        text_attention_mask=tokens.attention_mask,
        generator=seeds(0, 1),
        **settings,
    ).images
    torch.testing.assert_close(given, tiny(texts, generator=seeds(0, 1), **settings).images)


def test_given_latents_are_the_noise(tiny):
    g = torch.Generator().manual_seed(0)
    latents = {"prior_latents": torch.randn(1, 32, generator=g), "decoder_latents": torch.randn(1, 3, 64, 64, generator=g)}
    kwargs = {"size": 64, "output_type": "pt", "prior_candidates": 1}
    drawn = tiny("a star", generator=seeds(0), **kwargs).images
    assert torch.equal(tiny("a star", **latents, **kwargs).images, drawn)
    with pytest.raises(ValueError, match=r"\[1, 32\], got \[1, 31\]"):
        tiny("a star", prior_latents=torch.randn(1, 31), size=64)


BAD = [
    ({"prompt": ""}, "prompt is empty: ''"),
    ({"prompt": "   "}, "prompt is empty"),
    ({"prompt": 7}, "got 7"),
    ({"prompt": []}, "got \\[\\]"),
    ({"prompt": ["a", None]}, "got None"),
    ({"prompt": None}, "give a prompt"),
    ({"size": 128}, "64, 256, 1024, got 128"),
    ({"decoder_num_inference_steps": 0}, "decoder_num_inference_steps .* at least 1, got 0"),
    ({"prior_num_inference_steps": -3}, "got -3"),
    ({"decoder_guidance_scale": -1.0}, "decoder_guidance_scale .* got -1.0"),
    ({"prior_guidance_scale": math.nan}, "prior_guidance_scale .* got nan"),
    ({"decoder_guidance_scale": math.inf}, "got inf"),
    ({"num_images_per_prompt": 0}, "got 1 prompts x 0"),
    ({"num_images_per_prompt": 10_001}, "got 1 prompts x 10001"),
    ({"output_type": "jpg"}, "got 'jpg'"),
    ({"generator": seeds(1, 2)}, "2 generators were given for 1 images"),
    ({"prior": "none", "prior_latents": torch.zeros(1, 32)}, "prior_latents start the prior, which does not run here"),
    ({"super_res_latents": torch.zeros(1, 3, 256, 256)}, "drawn above 64 pixels: choose a larger size"),
    (
        {"text_model_output": (torch.zeros(1, 32), torch.zeros(1, 17, 32)), "text_attention_mask": torch.ones(1, 17)},
        "17 tokens, of which this CLIP has 16",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_a_value_error_that_names_the_value(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**({"prompt": "a star", "size": 64} | arguments))


def test_a_long_prompt_warns_of_what_was_cut(tiny, caplog):
    words = "a red circle and " * 6 + "finally a moose"
    image = tiny(words, generator=seeds(0), size=64, output_type="pt").images
    assert "finally a moose" in caplog.text and "16 tokens" in caplog.text
    cut = tiny(words + " and a car", generator=seeds(0), size=64, output_type="pt").images
    assert torch.equal(image, cut)


def test_unknown_defaults_are_refused():
    with pytest.raises(ValueError, match="prior_stepz"):
        UnCLIPPipeline(**tiny_networks(), defaults={"prior_stepz": 3})


def test_given_embeddings_take_the_priors_place(tiny):
    tiny.to(torch.float64)
    embeds = UnCLIPPriorPipeline.from_pipe(tiny)("a star", generator=seeds(0)).image_embeds
    start = torch.randn(1, 3, 64, 64, generator=seeds(1)[0])
    settings = {"decoder_latents": start, "size": 64, "output_type": "pt"}
    own = tiny("a star", generator=seeds(0), **settings).images
    torch.testing.assert_close(tiny("a star", image_embeds=embeds, **settings).images, own, rtol=0, atol=1e-9)
    other = tiny("a star", image_embeds=-embeds, **settings).images
    assert (other - own).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"image_embeds must be \[1, 32\], got \[2, 32\]"):
        tiny("a star", image_embeds=embeds.repeat(2, 1), **settings)


def test_without_a_prior_the_decoder_is_conditioned_on_the_text_alone(tiny):
    settings = {"output_type": "pt", "size": 64}
    alone = tiny("a ring", generator=seeds(0), prior="none", **settings).images
    null = tiny.text_proj.learned_classifier_free_guidance_embeddings.detach()
    assert torch.equal(alone, tiny("a ring", generator=seeds(0), image_embeds=null[None], **settings).images)
    assert not torch.allclose(alone, tiny("a star", generator=seeds(0), prior="none", **settings).images, atol=1e-3)
    drawn = tiny("a ring", generator=seeds(0), prior="diffusion", **settings).images
    assert torch.equal(drawn, tiny("a ring", generator=seeds(0), **settings).images) and not torch.equal(drawn, alone)
    for prior, message in (("difusion", "did you mean"), ("autoregressive", "this checkpoint's prior is diffusion")):
        with pytest.raises(ValueError, match=message):
            tiny("a ring", prior=prior)
    with pytest.raises(ValueError, match="take the prior's place"):
        tiny("a ring", prior="none", image_embeds=null[None])


def test_upsampling_a_drawn_image_is_drawing_it_large(tiny):
    tiny.to(torch.float64)
    whole = tiny("a star", generator=seeds(0), output_type="pt", size=1024).images
    stream = seeds(0)
    small = tiny("a star", generator=stream, output_type="pt", size=64).images
    middle = tiny.upsample(small, 256, stream)
    assert middle.shape == (1, 3, 256, 256)
    torch.testing.assert_close(tiny.upsample(middle, 1024, stream), whole, rtol=0, atol=1e-7)
    for wrong, size in ((small, 64), (small[:, :, :32], 256), (small, 100)):
        with pytest.raises(ValueError, match="got"):
            tiny.upsample(wrong, size)
