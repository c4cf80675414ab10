"""The tools on an image's latents: inversion, variations, interpolation, edits."""

import karlo
import numpy as np
import pytest
import torch
from conftest import seeds
from drawing import close
from PIL import Image

from unclip import (
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPInterpolationPipeline,
    UnCLIPPCAPipeline,
    UnCLIPPipeline,
    UnCLIPTextDiffPipeline,
)
from unclip.clip.model import CLIP
from unclip.diffusion.latents import PrincipalAxes
from unclip.io.images import with_margins
from unclip.pipelines.call import Call
from unclip.pipelines.settings import BATCH, SamplingSettings
from unclip.pipelines.sizes import Extent
from unclip.pipelines.stages.image import decoder_images


def plain_image(colour=(200, 60, 40), size=(80, 64)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    image.paste(colour, (10, 10, 50, 40))
    return image


@pytest.fixture(params=["ours", "karlo"])
def whole(request, tiny, tmp_path) -> UnCLIPPipeline:
    """A pipeline with every part, in float64."""
    pipe = tiny if request.param == "ours" else UnCLIPPipeline(**karlo.parts(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


def smallest(pipe, **kwargs) -> dict:
    return {"size": pipe.sizes[0], "output_type": "pt", **kwargs}


def true(pipe, image) -> torch.Tensor:
    side = pipe.sizes[0]
    return decoder_images(image, Call(SamplingSettings(), None, Extent(0, side, side))) / 2 + 0.5


def test_inversion_and_sampling_reconstruct_an_image_and_eta_varies_it(tiny):
    pipe = UnCLIPImageVariationPipeline.from_pipe(tiny.to(torch.float64))
    image = plain_image()
    errors = []
    for eta in (0.0, 0.3, 1.0):
        again = pipe(image, eta=eta, generator=seeds(1), decoder_num_inference_steps=50, **smallest(pipe)).images
        errors.append((again - true(pipe, image)).square().mean())
    assert errors[0] < errors[1] < errors[2]
    fresh = pipe(image, generator=seeds(1), **smallest(pipe)).images
    assert errors[0] < 0.2 * (fresh - true(pipe, image)).square().mean()
    same = [pipe(image, eta=0.0, num_images_per_prompt=2, generator=seeds(s, s + 1), **smallest(pipe)).images for s in (1, 5)]
    close(*same)  # nothing random is left
    close(same[0][0], same[0][1])


def test_a_text_conditions_a_variation(whole):
    pipe = UnCLIPImageVariationPipeline.from_pipe(whole)
    settings = smallest(pipe, decoder_num_inference_steps=3)
    plain = pipe([plain_image(), plain_image("blue")], generator=seeds(1, 2), **settings).images
    close(pipe([plain_image(), plain_image("blue")], prompt="", generator=seeds(1, 2), **settings).images, plain)
    steered = pipe([plain_image(), plain_image("blue")], prompt=["a star", ""], generator=seeds(1, 2), **settings).images
    assert (steered[0] - plain[0]).abs().max() > 1e-5
    close(steered[1], plain[1])
    with pytest.raises(ValueError, match="prompt must be a str, or a list of 2"):
        pipe([plain_image(), plain_image("blue")], prompt=["a", "b", "c"], **settings)


def test_a_path_begins_and_ends_at_its_ends(whole):
    pipe, vary = UnCLIPInterpolationPipeline.from_pipe(whole), UnCLIPImageVariationPipeline.from_pipe(whole)
    ends = [plain_image(), plain_image("blue")]
    settings = smallest(pipe, decoder_num_inference_steps=3)
    path = pipe(ends, steps=5, generator=seeds(3)[0], **settings).images
    assert len(path) == 5
    for end, drawn in zip(ends, (path[0], path[-1]), strict=True):
        close(vary(end, generator=seeds(3), **settings).images[0], drawn)
    close(pipe(ends[::-1], steps=5, generator=seeds(3)[0], **settings).images.flip(0), path)
    mixed = pipe(ends, weights=[[1, 0], [0.5, 0.5], [0, 2]], generator=seeds(3)[0], **settings).images
    close(mixed, path[[0, 2, 4]], 1e-6)


def test_paths_between_sentences_and_images_through_both_kinds_of_noise(whole):
    pipe = UnCLIPInterpolationPipeline.from_pipe(whole)
    settings = smallest(pipe, decoder_num_inference_steps=3, prior_num_inference_steps=2)
    for ends in (["a star", "two rings"], ["a star", plain_image()], [plain_image(), "a star"]):
        for noise in ("fixed", "interpolated"):
            path = pipe(ends, steps=3, noise=noise, generator=seeds(0)[0], **settings).images
            assert path.shape[0] == 3 and path.isfinite().all()
    three = pipe(["a star", plain_image(), "z"], weights=[[1, 1, 1]], generator=seeds(0)[0], **settings).images
    assert three.shape[0] == 1
    inverted = pipe([plain_image(), plain_image("blue")], steps=2, noise="interpolated", generator=seeds(0)[0], **settings)
    settings.pop("prior_num_inference_steps")
    again = UnCLIPImageVariationPipeline.from_pipe(whole)(plain_image(), eta=0.0, **settings).images
    close(inverted.images[0], again[0])


MANY = {
    UnCLIPInterpolationPipeline: (([plain_image(), plain_image("blue")],), {"steps": 5}),
    UnCLIPTextDiffPipeline: ((plain_image(), "a black cat"), {"strength": [0.1, 0.2, 0.3, 0.4, 0.5]}),
    UnCLIPPCAPipeline: ((plain_image(), PrincipalAxes.of(torch.eye(32)), (0, 5, 10, 20, 31)), {}),
}


def many(pipe, **kwargs) -> torch.Tensor | list:
    """Five images that are drawn from the same noise."""
    arguments, settings = MANY[type(pipe)]
    steps = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 1}
    settings = settings | steps | {"size": 256, "output_type": "pt", "decoder_guidance_scale": 1.0}
    return pipe(*arguments, generator=seeds(3)[0], **(settings | kwargs)).images


@pytest.mark.parametrize("kind", MANY)
def test_many_images_are_drawn_in_batches_and_are_the_same(tiny, kind, monkeypatch):
    """At most as many at once as `generate` draws, a stage after the other."""
    pipe, seen = kind.from_pipe(tiny.to(torch.float64)), []

    def note(which, step, timestep, given):
        if step == 0 and which.stage != "inversion":
            seen.append((which.stage, len(given["latents"])))

    whole = many(pipe, callback_on_step_end=note)
    assert seen == [("decoder", 5), ("upsampler_256", 5)]
    monkeypatch.setitem(BATCH, 256, 2)
    seen.clear()
    close(many(pipe, callback_on_step_end=note), whole)
    assert seen == [(stage, n) for stage in ("decoder", "upsampler_256") for n in (2, 2, 1)]
    monkeypatch.setitem(BATCH, 64, 2)
    pixels, arrays, images = (many(pipe, size=64, output_type=kind) for kind in ("pt", "np", "pil"))
    assert np.array_equal(arrays, pixels.permute(0, 2, 3, 1).numpy()) and len(images) == 5
    assert np.array_equal(np.stack([np.asarray(p) for p in images]), (arrays * 255).round().astype("uint8"))


def test_interrupted_in_a_batch_a_path_is_as_far_as_its_stage_began(tiny, monkeypatch):
    monkeypatch.setitem(BATCH, 256, 2)
    pipe = UnCLIPInterpolationPipeline.from_pipe(tiny)

    def drawn(stage: str, number: int) -> tuple[int, ...]:
        """The answer's shape, ended in the first step of a stage's batch."""
        batches = []

        def end(which, step, timestep, given):
            if which.stage == stage and step == 0:
                batches.append(stage)
                which._interrupt = len(batches) == number

        return tuple(many(pipe, callback_on_step_end=end).shape)

    assert drawn("decoder", 1) == (2, 3, 64, 64) and drawn("decoder", 2) == (4, 3, 64, 64)
    assert drawn("upsampler_256", 1) == (2, 3, 256, 256) and drawn("upsampler_256", 3) == (5, 3, 256, 256)


def test_an_edit_of_no_strength_is_the_image(whole):
    edit, vary = UnCLIPTextDiffPipeline.from_pipe(whole), UnCLIPImageVariationPipeline.from_pipe(whole)
    settings = smallest(edit, decoder_num_inference_steps=5)
    drawn = edit(plain_image(), "a black cat", "a cat", strength=[0.0, 0.2, 0.4], **settings).images
    close(drawn[0], vary(plain_image(), eta=0.0, **settings).images[0])
    changes = (drawn - drawn[:1]).square().mean((1, 2, 3))
    assert changes[1] > 0 and changes[2] > changes[1]
    assert not torch.equal(edit(plain_image(), "a black cat", strength=0.4, **settings).images[0], drawn[2])


def half(size=(80, 64), box=(40, 0, 80, 64)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


AGAIN = {"image": plain_image(), "eta": 0.0}
REPAINT = {"prompt": "a star", "image": plain_image(), "mask_image": half()}
NARROW = REPAINT | {"image": Image.new("RGB", (1, 3000)), "mask_image": half((1, 3000), (0, 0, 1, 900))}


@pytest.mark.parametrize("last", [0, 1, 2])
def test_known_pixels_are_unchanged(tiny, last):
    pipe = UnCLIPInpaintPipeline.from_pipe(tiny)
    image = plain_image().resize((tiny.sizes[last],) * 2)
    mask = half(image.size, (image.width // 2, 0, image.width, image.height // 3))
    settings = {"size": tiny.sizes[last], "decoder_num_inference_steps": 3, "resample": 2}
    drawn = pipe("a star", image, mask, generator=seeds(0), **settings).images[0]
    white = np.asarray(mask) >= 128
    same = (np.asarray(drawn) == np.asarray(image)).all(-1)
    assert drawn.size == image.size and same[~white].all() and same[white].mean() < 0.5
    again = pipe("a star", image, mask, generator=seeds(1), **settings).images[0]
    assert not np.array_equal(np.asarray(again)[white], np.asarray(drawn)[white])


def test_x0_estimates_contain_the_known_part(tiny):
    pipe, seen = UnCLIPInpaintPipeline.from_pipe(tiny), []
    image, mask = plain_image(size=(64, 64)), half((64, 64), (32, 0, 64, 64))
    inputs = {"callback_on_step_end": lambda p, i, t, given: seen.append(given["pred_original_sample"])}
    settings = smallest(pipe, decoder_num_inference_steps=3, resample=2, generator=seeds(0))
    drawn = pipe(
        "a star", image, mask, callback_on_step_end_tensor_inputs=["pred_original_sample"], **inputs, **settings
    ).images
    seen = [expected / 2 + 0.5 for expected in seen if expected.ndim == 4]
    assert len(seen) == 5 and not torch.equal(seen[0], seen[-1])
    for expected in seen:
        torch.testing.assert_close(expected[..., :32], drawn[..., :32])
    torch.testing.assert_close(seen[-1], drawn, atol=1e-2, rtol=0)


def test_a_single_white_pixel_of_a_large_mask_is_repainted(tiny):
    pipe = UnCLIPInpaintPipeline.from_pipe(tiny)
    image = plain_image(size=(330, 330))
    dot = half(image.size, (200, 100, 201, 101))
    drawn = pipe("a star", image, dot, size=64, output_type="pt", decoder_num_inference_steps=2, generator=seeds(0)).images
    known, mask = pipe._fit(image, dot, [64, 64])
    assert mask.sum() == 1 and mask[0, 0, 100 * 64 // 330, 200 * 64 // 330] == 1
    other = ((drawn - (known / 2 + 0.5)).abs().amax(1) > 1 / 255).sum()
    assert other == 1


def test_each_step_is_resampled_and_the_new_part_depends_on_the_known_one(whole):
    pipe = UnCLIPInpaintPipeline.from_pipe(whole)
    calls = []
    pipe.decoder.register_forward_hook(lambda *a: calls.append(1))
    settings = smallest(pipe, decoder_num_inference_steps=4)
    image = plain_image(size=(64, 64))
    mask = half((64, 64), (32, 0, 64, 64))
    for resample, expected in ((1, 4), (3, 10)):
        calls.clear()
        pipe("a star", image, mask, resample=resample, generator=seeds(0), **settings)
        assert len(calls) == expected  # the last step is taken once
    drawn = [pipe("a star", i, mask, generator=seeds(0), **settings).images for i in (image, plain_image("blue", (64, 64)))]
    side = drawn[0].shape[-1]
    assert (drawn[0] - drawn[1])[
        ..., side // 2 + 1 :
    ].abs().max() > 1e-6  # the known part differs, and the new one depends on it


def test_images_keep_their_proportions_and_margins_are_new(tiny):
    pipe = UnCLIPInpaintPipeline.from_pipe(tiny)
    assert pipe.sides_like(Image.new("RGB", (200, 100)), 64) == (44, 92)
    canvas, mask = with_margins(plain_image(size=(60, 60)), 20, 0, 0, 20)
    assert canvas.size == mask.size == (80, 80)
    drawn = pipe("a star", canvas, mask, size=64, decoder_num_inference_steps=2, generator=seeds(0)).images[0]
    assert drawn.size == (64, 64)
    with pytest.raises(ValueError, match="margins must be at least 0 and not all 0, got left -1"):
        with_margins(plain_image(), -1, 0, 0, 4)
    with pytest.raises(ValueError, match="four zeros"):
        with_margins(plain_image(), 0, 0, 0, 0)


def test_interrupted_in_the_decoder_known_pixels_are_unchanged(tiny):
    pipe = UnCLIPInpaintPipeline.from_pipe(tiny)
    image = plain_image(size=(64, 64))

    def end(which, step, timestep, given):
        which._interrupt = which.stage == "decoder"

    for size in (64, 256):
        settings = {"size": size, "generator": seeds(0), "callback_on_step_end": end}
        (drawn,) = pipe("a star", image, half((64, 64), (32, 0, 64, 64)), **settings).images
        left, kept = (np.asarray(p)[:, :32].astype(int) for p in (drawn, image))
        assert drawn.size == (64, 64) and np.abs(left - kept).mean() < (2 if size == 256 else 1e-9)


def test_clip_guidance_raises_what_clip_sees(whole):
    settings = smallest(whole, decoder_num_inference_steps=8, prior_num_inference_steps=2)
    clip = CLIP(whole.text_encoder, whole.tokenizer, whole.image_encoder, whole.feature_extractor)
    wanted = clip.encode_text(["a star", "two rings"])
    seen = []
    for strength in (0.0, 0.1, 0.4):
        drawn = whole(["a star", "two rings"], generator=seeds(1, 2), clip_guidance=strength, **settings).images
        seen.append((clip.encode_image(drawn.float()) * wanted).sum(-1))
    assert (seen[1] > seen[0]).all() and (seen[2] > seen[0]).all()  # how much more, an untrained CLIP leaves to rounding
    alone = whole("two rings", generator=seeds(2), clip_guidance=0.4, **settings).images
    close(alone[0], drawn[1], 1e-5)
    assert not any(p.requires_grad and p.grad is not None for p in whole.decoder.parameters())
    for wrong in (-1, float("nan"), "much"):
        with pytest.raises(ValueError, match="clip_guidance must be a number of at least 0"):
            whole("a star", clip_guidance=wrong)
    whole.image_encoder = None
    with pytest.raises(ValueError, match="which clip_guidance needs"):
        whole("a star", clip_guidance=1.0)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (UnCLIPImageVariationPipeline, {"image": plain_image(), "eta": 1.5}, "eta must be from 0 to 1, got 1.5"),
        (UnCLIPImageVariationPipeline, {"image_embeddings": torch.ones(1, 32), "eta": 0.0}, "eta needs the image itself"),
        (UnCLIPImageVariationPipeline, {"image_embeddings": torch.ones(1, 31)}, r"\[B, 32\], got \[1, 31\]"),
        (UnCLIPImageVariationPipeline, {"image": []}, r"got \[\]"),
        (UnCLIPImageVariationPipeline, {"image": torch.ones(3, 64, 64)}, r"\[B, 3, S, S\], got \[3, 64, 64\]"),
        (UnCLIPImageVariationPipeline, AGAIN | {"decoder_latents": torch.ones(1, 3, 64, 64)}, "give eta or decoder_latents"),
        (UnCLIPImageVariationPipeline, AGAIN | {"image_embeddings": torch.ones(2, 32)}, "must be as many, got 1 and 2"),
        (UnCLIPImageVariationPipeline, AGAIN | {"negative_prompt": "red"}, "negative_prompt 'red', and there is none here"),
        (UnCLIPImageVariationPipeline, {"image": plain_image(), "super_res_latents": torch.ones(1)}, "choose a larger size"),
        (UnCLIPInterpolationPipeline, {"ends": ["a", "b"], "weights": []}, r"at least one mixture, got \[\]"),
        (UnCLIPTextDiffPipeline, {"image": "cat.png", "target": "a"}, "image must be a PIL image, got 'cat.png'"),
        (UnCLIPInterpolationPipeline, {"ends": ["a"]}, "two or more"),
        (UnCLIPInterpolationPipeline, {"ends": ["a", " "]}, "empty sentence"),
        (UnCLIPInterpolationPipeline, {"ends": ["a", "b"], "steps": 1}, "at least 2 steps"),
        (UnCLIPInterpolationPipeline, {"ends": ["a", "b", "c"]}, "two ends"),
        (UnCLIPInterpolationPipeline, {"ends": ["a", "b"], "weights": [[0, 0]]}, "do not sum to 0"),
        (UnCLIPInterpolationPipeline, {"ends": ["a", "b"], "noise": "pink"}, "'pink'"),
        (UnCLIPInterpolationPipeline, {"ends": ["a", "b"], "generator": seeds(1)}, "one generator"),
        (UnCLIPTextDiffPipeline, {"image": plain_image(), "target": "a", "source": "a"}, "the same sentence, 'a'"),
        (UnCLIPTextDiffPipeline, {"image": plain_image(), "target": "a", "strength": 2}, "strength must be from 0 to 1, got 2"),
        (UnCLIPTextDiffPipeline, {"image": plain_image(), "target": ""}, "must be sentences"),
        (UnCLIPInpaintPipeline, REPAINT | {"mask_image": half((9, 9))}, "same size, got 80x64 and 9x9 pixels"),
        (UnCLIPInpaintPipeline, REPAINT | {"mask_image": Image.new("L", (80, 64), 255)}, "white all over"),
        (UnCLIPInpaintPipeline, REPAINT | {"mask_image": Image.new("L", (80, 64), 0)}, "the mask has no white"),
        (UnCLIPInpaintPipeline, NARROW, "an image of 1x3000 pixels is too narrow to be drawn at about 64x64"),
        (UnCLIPInpaintPipeline, REPAINT | {"resample": 0}, "resample must be a whole number of at least 1, got 0"),
        (UnCLIPInpaintPipeline, REPAINT | {"prompt": ["a", "b"]}, "prompt must be a str"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input_names_the_value(tiny, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind.from_pipe(tiny)(**arguments, size=64)


def test_sentences_that_clip_cannot_tell_apart_are_named(tiny):
    """Their difference has no length to divide by: the image was black."""
    tool = UnCLIPTextDiffPipeline.from_pipe(tiny)
    with pytest.raises(ValueError, match="to CLIP 'A star' and 'a star' are the same: there is no difference to follow"):
        tool(Image.new("RGB", (64, 64), "red"), "a star", "A star", size=64, decoder_num_inference_steps=2)


def test_no_steps_are_not_the_default(tiny):
    tool = UnCLIPImageVariationPipeline.from_pipe(tiny)
    with pytest.raises(ValueError, match="decoder_num_inference_steps must be a whole number of at least 1, got 0"):
        tool(Image.new("RGB", (64, 64), "red"), eta=0.0, size=64, decoder_num_inference_steps=0)
