"""What the deprecated classes' successors are asked beyond the others: batches, guidance, variants, sizes, loading."""

import inspect
import json
import shutil

import karlo
import pytest
import torch
from conftest import randomise, seeds, tiny_networks
from drawing import STEPS, close, draw, subjects
from PIL import Image
from safetensors.torch import load_file, save_file

from unclip import CLIP, UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.pipelines.samplers import SAMPLERS
from upsamplers import Upsampler


def test_the_call_has_the_deprecated_arguments_in_their_order(pipe):
    deprecated = pytest.importorskip("diffusers.pipelines.deprecated.unclip")
    old = list(inspect.signature(getattr(deprecated, type(pipe).__name__).__call__).parameters)
    assert list(inspect.signature(type(pipe).__call__).parameters)[: len(old)] == old


def test_a_batch_equals_its_images_one_by_one(pipe):
    pipe.to(torch.float64)
    whole = draw(pipe, 3)
    for n, subject in enumerate(subjects(pipe, 3)):
        close(draw(pipe, subject=[subject], numbers=[n]), whole[n : n + 1])


def test_batches_of_any_size(pipe):
    for count in (1, 2, 4):
        assert len(draw(pipe, count)) == count
        assert len(draw(pipe, count, num_images_per_prompt=2)) == 2 * count


def test_several_images_come_prompt_by_prompt(pipe):
    pipe.to(torch.float64)
    several = draw(pipe, 2, numbers=[5, 6, 7, 8], num_images_per_prompt=2)
    close(several[1:2], draw(pipe, 1, numbers=[6]))


def test_optional_components_stay_absent(pipe, tmp_path):
    absent = [n for n in pipe._optional_components if n != "prior_scheduler"]  # only an autoregressive prior has none
    for name in absent:
        setattr(pipe, name, None)
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert all(getattr(again, name) is None for name in absent)
    given = {} if isinstance(pipe, UnCLIPPipeline) else {"image": None, "image_embeddings": torch.ones(1, 32)}
    prompt = {"prompt": "a star"} if isinstance(pipe, UnCLIPPipeline) else {}
    for one in (pipe, again):
        image = one(**prompt, **given, **STEPS, output_type="pt", generator=seeds(0)).images
        assert image.shape[-1] == pipe.sizes[-1] == pipe.sizes[1]


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variants(pipe, tmp_path, name, dtype):
    pipe.to(dtype)
    pipe.save_pretrained(tmp_path / "saved", variant=name)
    assert {v.dtype for p in (tmp_path / "saved").rglob(f"*.{name}.safetensors") for v in load_file(p).values()} >= {dtype}
    pipe.to(torch.float64)
    again = type(pipe).from_pretrained(tmp_path / "saved", variant=name, dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    close(draw(pipe), draw(again))
    for variant, message in ((None, f"holds no variant-less weights; it has: {name}"), ("fp8", "holds no variant 'fp8'")):
        with pytest.raises(ValueError, match=message):
            type(pipe).from_pretrained(tmp_path / "saved", variant=variant)


def test_dtype_of_every_component(pipe):
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        pipe.to(dtype)
        found = {c.dtype for c in pipe.components.values() if isinstance(c, torch.nn.Module)}
        assert found == {dtype}
        assert draw(pipe).isfinite().all()


def test_guidance_of_one_is_no_guidance(pipe):
    """And the networks then see no second half."""
    batches = []
    pipe.decoder.register_forward_hook(lambda *a: batches.append(len(a[-1].sample)))
    scales = {"decoder_guidance_scale": 1.0}
    if isinstance(pipe, UnCLIPPipeline):
        scales["prior_guidance_scale"] = 1.0
    plain = draw(pipe, **scales)
    assert set(batches) == {1}
    close(draw(pipe, **dict.fromkeys(scales, 0.5)), plain)  # below 1 in every stage means none
    assert not torch.equal(draw(pipe, **(scales | {"decoder_guidance_scale": 3.0})), plain) and 2 in batches


def test_callback_sees_every_step_of_every_stage_and_may_replace_the_latents(pipe):
    seen = []

    def note(p, step, timestep, given):
        seen.append((p.stage, step, tuple(given["latents"].shape)))
        return {}

    draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["latents"])
    small, large = pipe.sizes[:2]
    prior = []
    if isinstance(pipe, UnCLIPPipeline):
        count = (pipe.config.defaults or {}).get("prior_num_inference_steps", 25)
        rows = (pipe.config.defaults or {}).get("prior_candidates", 1)
        prior = [("prior", n, (rows, 32)) for n in range(count)]
    assert seen == [
        *prior,
        *(("decoder", n, (1, 3, small, small)) for n in range(2)),
        *(("upsampler_256", n, (1, 3, large, large)) for n in range(2)),
    ]
    assert pipe.stage is None

    def whiten(p, step, timestep, given):
        return {"latents": torch.ones_like(given["latents"])} if p.stage == "upsampler_256" else None

    assert draw(pipe, callback_on_step_end=whiten).min() == 1
    with pytest.raises(ValueError, match="latents or pred_original_sample, not 'prompt_embeds'"):
        draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_callback_may_see_what_a_step_expects_of_the_finished_sample(pipe):
    """At a stage's last step that is what the stage answers, whatever its sampler."""
    inputs, seen, ends = ["pred_original_sample", "latents"], set(), []

    def note(p, step, timestep, given):
        assert list(given) == inputs and given["pred_original_sample"].shape == given["latents"].shape
        assert given["pred_original_sample"].dtype == given["latents"].dtype
        if step + 1 == p.num_timesteps:
            seen.add(p.stage)
            torch.testing.assert_close(*given.values(), rtol=2e-3, atol=1e-5)
        elif p.stage == "decoder":
            ends.append(given)
        return {}

    draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=inputs)
    assert seen >= {"decoder", "upsampler_256"} and ("prior" in seen) == isinstance(pipe, UnCLIPPipeline)
    assert ends and not any(torch.equal(*end.values()) for end in ends)


def test_interrupted_in_a_stage_the_call_ends_there(pipe):
    def stop(stage, step):
        def callback(p, i, t, given):
            seen.append((p.stage, i))
            p._interrupt = (p.stage, i) == (stage, step)

        return callback

    seen = []
    image = draw(pipe, callback_on_step_end=stop("decoder", 0))
    assert seen[-1] == ("decoder", 0) and image.shape[-1] == pipe.sizes[0]
    seen.clear()
    assert draw(pipe, callback_on_step_end=stop("upsampler_256", 0)).shape[-1] == pipe.sizes[1]
    assert seen[-1] == ("upsampler_256", 0)
    if isinstance(pipe, UnCLIPPipeline):
        seen.clear()
        assert len(draw(pipe, callback_on_step_end=stop("prior", 1))) == 0 and seen[-1] == ("prior", 1)
    assert draw(pipe).shape[-1] == pipe.sizes[1]  # the next call is whole again


def test_progress_bars_name_the_stages(pipe, capsys):
    draw(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    shown = capsys.readouterr().err
    assert "decoder" in shown and "upsampler 256" in shown
    assert ("prior" in shown) == isinstance(pipe, UnCLIPPipeline)


def test_from_pipe_shares_the_networks(pipe, tmp_path):
    other = UnCLIPImageVariationPipeline if isinstance(pipe, UnCLIPPipeline) else UnCLIPPipeline
    if other is UnCLIPPipeline:
        with pytest.raises(ValueError, match="UnCLIPPipeline needs a prior, and UnCLIPImageVariationPipeline has none"):
            other.from_pipe(pipe)
    have = karlo.parts(tmp_path)
    ours = type(pipe.decoder).__module__.startswith("decoder")
    extra = {
        n: (tiny_networks() if ours else have)[n] for n in ("prior", "prior_scheduler", "image_encoder", "feature_extractor")
    }
    new = other.from_pipe(pipe, **{n: v for n, v in extra.items() if n in other.component_names()})
    shared = set(new.components) & set(pipe.components) - set(extra)
    assert all(getattr(new, n) is getattr(pipe, n) for n in shared) and "decoder" in shared
    image = draw(new)
    assert image.isfinite().all()
    again = type(pipe).from_pipe(new, **{n: getattr(pipe, n) for n in extra if n in pipe.components})
    assert torch.equal(draw(again), draw(pipe)) and torch.equal(draw(new), image)
    with pytest.raises(ValueError, match="'vae' is no part"):
        other.from_pipe(pipe, **{n: v for n, v in extra.items() if n in other.component_names()}, vae=None)


def test_output_types_and_unknown_ones(pipe):
    settings = {"size": pipe.sizes[0], **STEPS}
    pil = pipe(subjects(pipe, 1), **settings).images[0]
    assert isinstance(pil, Image.Image) and pil.size == (pipe.sizes[0],) * 2
    with pytest.raises(ValueError, match="pil, np or pt, got 'webp'"):
        draw(pipe, output_type="webp")


def test_sides_that_are_not_square(pipe):
    small, large = pipe.sizes[:2]
    step = large // small * pipe.decoder.stride if hasattr(pipe.decoder, "stride") else large // small * 2
    wide = draw(pipe, height=large, width=large + step)
    assert wide.shape == (1, 3, large, large + step) and wide.isfinite().all()
    assert draw(pipe, height=large, width=large).equal(draw(pipe))
    near = f"the nearest are {large} and {large + step}"
    with pytest.raises(ValueError, match=f"height must be a multiple of {step} at size {large}, got {large + 1}; {near}"):
        draw(pipe, height=large + 1)
    with pytest.raises(ValueError, match=f"width must be .* got -8; the nearest is {step}"):
        draw(pipe, width=-8)


def test_parts_of_another_clip_are_refused(pipe):
    parts = dict(pipe.components)
    name = "text_encoder"
    other = tiny_networks()[name]
    config = dict(other.config) | {"embedding_dim": 48}
    parts[name] = type(other)(**{k: v for k, v in config.items() if not k.startswith("_")})
    with pytest.raises(ValueError, match="text_encoder and .* 48 dimensions, .* 32 dimensions"):
        type(pipe)(**parts)


def test_a_stage_trained_with_another_clip_is_refused(tiny):
    """By the CLIP's fingerprint, where the widths agree; in any dtype."""
    parts = dict(tiny.components)
    clip = CLIP(*(parts[n] for n in ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")))
    clip.stamp()
    stamped = clip.fingerprint
    for name in ("prior", "text_proj"):
        parts[name].register_to_config(clip_fingerprint=stamped)
    UnCLIPPipeline(**parts).to(torch.float16)
    assert clip.fingerprint == stamped
    next(parts["text_encoder"].parameters()).data[0] += 0.5
    clip.to(torch.float32).stamp()
    with pytest.raises(ValueError, match=f"text_encoder is made for the CLIP {clip.fingerprint}, prior for the CLIP {stamped}"):
        UnCLIPPipeline(**parts)


def test_a_checkpoint_without_a_part_names_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    index_path = tmp_path / "saved" / "model_index.json"
    shutil.rmtree(tmp_path / "saved" / "decoder_scheduler")
    with pytest.raises(ValueError, match="lacks the folder decoder_scheduler/"):
        type(pipe).from_pretrained(tmp_path / "saved")
    index_path.write_text(json.dumps({k: v for k, v in json.loads(index_path.read_text()).items() if "scheduler" not in k}))
    with pytest.raises(ValueError, match=r"model_index.json names no \w+_scheduler, and UnCLIP\w*Pipeline needs one"):
        type(pipe).from_pretrained(tmp_path / "saved")


def test_a_prior_without_its_statistics_names_the_file(pipe, tmp_path):
    if not hasattr(pipe, "prior"):
        pytest.skip("no prior")
    pipe.save_pretrained(tmp_path / "saved")
    path = next((tmp_path / "saved" / "prior").glob("*.safetensors"))
    save_file({k: v for k, v in load_file(path).items() if k != "clip_std"}, path)
    with pytest.raises(ValueError, match=f"{path.name} lacks clip_std"):
        type(pipe).from_pretrained(tmp_path / "saved")


def test_a_hub_id_comes_through_the_same_path(pipe, tmp_path, monkeypatch):
    """A revision of a repository, as the Hub's client keeps it on disk; nothing but safetensors and configurations."""
    from huggingface_hub import constants

    cache = tmp_path / "models--kakaobrain--karlo-tiny"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for name, commit in commits.items():
        pipe.save_pretrained(cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(commit)
    (cache / "snapshots" / commits["main"] / "model_index.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    again = type(pipe).from_pretrained("kakaobrain/karlo-tiny", revision="v1", dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    close(draw(again), draw(pipe.to(torch.float64)))
    with pytest.raises(ValueError, match="model_index.json is missing"):
        type(pipe).from_pretrained("kakaobrain/karlo-tiny", revision="main")
    with pytest.raises(ValueError, match="'kakaobrain/none' is no folder and not in the Hub's cache, and .* be reached$"):
        type(pipe).from_pretrained("kakaobrain/none")
    monkeypatch.undo()
    elsewhere = type(pipe).from_pretrained("kakaobrain/karlo-tiny", revision="v1", cache_dir=tmp_path, token="t")
    assert elsewhere.sizes == pipe.sizes


def test_an_image_in_tiles_equals_the_whole_one(tiny, monkeypatch):
    """Twice as high as its upsampler was made for: the network sees tiles, the image shows none."""
    tiny.to(torch.float64)
    seen = []
    tiny.super_res_first.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["sample"].shape[-2:])), with_kwargs=True)
    tall = draw(tiny, height=768, width=256)
    assert tall.shape == (1, 3, 768, 256) and max(max(s) for s in seen) == 256
    monkeypatch.setattr("unclip.pipelines.stages.upsamplers.tiled", lambda network, x, *a: network(x))
    close(tall, draw(tiny, height=768, width=256), 1e-3)


def test_negative_prompts_take_the_empty_ones_place(pipe):
    if not isinstance(pipe, UnCLIPPipeline):
        pytest.skip("no prompt")
    pipe.to(torch.float64)
    plain = draw(pipe, 2)
    close(draw(pipe, 2, negative_prompt=""), plain)
    away = draw(pipe, 2, negative_prompt=["rain", "a crowd"])
    assert (away - plain).abs().amax((1, 2, 3)).min() > 1e-4
    close(draw(pipe, 2, negative_prompt="rain")[:1], away[:1])
    unguided = {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0}
    close(draw(pipe, negative_prompt="rain", **unguided), draw(pipe, **unguided))
    # leading away from what one asks for leaves the guidance nothing to do
    close(draw(pipe, 1, negative_prompt="a star", decoder_guidance_scale=1.0), draw(pipe, **unguided), 1e-6)
    for wrong in (["one", "two", "three"], 7, [None, "x"]):
        with pytest.raises(ValueError, match="negative_prompt must be a str, or a list of 2"):
            draw(pipe, 2, negative_prompt=wrong)


def test_karlo_goes_on_to_the_size_of_our_upsampler(tmp_path):
    parts = {k: v for k, v in karlo.parts(tmp_path).items() if k not in ("feature_extractor", "image_encoder")}
    ours = randomise(Upsampler(128, channels=[8], blocks=[1], time_embed_dim=16))
    pipe = UnCLIPPipeline(**parts, upsampler_1024=ours, upsampler_1024_scheduler=tiny_networks()["upsampler_1024_scheduler"])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.to(torch.float32).sizes == [16, 32, 128]
    assert draw(pipe, size=128).shape == (1, 3, 128, 128)
    pipe.save_pretrained(tmp_path / "saved")
    assert UnCLIPPipeline.from_pretrained(tmp_path / "saved").sizes == [16, 32, 128]


def test_the_kernel_can_be_chosen(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    images = []
    for kernel in ("auto", "math", "sdpa"):
        again = type(pipe).from_pretrained(tmp_path / "saved", attention=kernel, dtype=torch.float64)
        again.set_progress_bar_config(disable=True)
        images.append(draw(again))
    close(images[1], images[0])
    close(images[2], images[0], 1e-6)
    with pytest.raises(ValueError, match="unknown attention 'flash'; choose from auto, xformers, sdpa, math"):
        pipe.set_attention("flash")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'xformers' cannot be used: .* CUDA"):
            type(pipe).from_pretrained(tmp_path / "saved", attention="xformers")


def test_diffusers_names_for_the_kernel_and_its_memory(pipe):
    """Old code calls these; diffusers' own processors know nothing of unCLIP's masks and would take the place of ours."""

    def kinds() -> list[type]:
        networks = [getattr(pipe, n) for n in ("prior", "decoder") if n in pipe.components]
        return [type(p) for n in networks for p in getattr(n, "attn_processors", {}).values()]

    pipe.to(torch.float64)
    expected, before = draw(pipe), kinds()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'xformers' cannot be used: it has no kernel for a CPU"):
            pipe.enable_xformers_memory_efficient_attention()
    pipe.enable_attention_slicing()
    close(draw(pipe), expected)
    pipe.disable_attention_slicing()
    pipe.disable_xformers_memory_efficient_attention()
    close(draw(pipe), expected, 1e-6)
    assert kinds() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, got 3"),
        ({"generator": [None]}, "generator must be a torch.Generator or a list of them, got None"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be callable, got 3"),
        ({"decoder_latents": [1]}, r"latents must be a tensor of the shape \[1, 3, 64, 64\], got \[1\]"),
        ({"prior_latents": torch.zeros(2, 3)}, r"latents must be a tensor of the shape \[1, 32\], got \[2, 3\]"),
        (
            {"text_model_output": (torch.zeros(1, 31), torch.zeros(1, 16, 31)), "text_attention_mask": torch.ones(1, 16)},
            r"text_model_output must be \[B, 32\] and .*; got \[1, 31\], \[1, 16, 31\], \[1, 16\]",
        ),
        (
            {"text_model_output": (torch.zeros(1, 32), torch.zeros(1, 16, 32)), "text_attention_mask": torch.ones(1, 9)},
            r"got \[1, 32\], \[1, 16, 32\], \[1, 9\]",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_arguments_of_another_kind_are_named(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("a star", size=64, output_type="pt", **(STEPS | arguments))


def test_every_sampler_draws_towards_the_same_image(pipe):
    """With enough steps the deterministic ones agree (through a random network that predicts noise, they need not)."""
    pipe.to(torch.float64)
    drawn = {s: draw(pipe, sampler=s, decoder_num_inference_steps=40, size=pipe.sizes[0]) for s in SAMPLERS}
    own = draw(pipe, decoder_num_inference_steps=40, size=pipe.sizes[0])
    assert all(d.isfinite().all() and d.shape == own.shape for d in drawn.values())
    if pipe.decoder_scheduler.config.prediction_type == "v_prediction":
        assert (drawn["dpmsolver++2m"] - drawn["ddim"]).abs().mean() < 0.3 * own.std()
    assert torch.equal(own, drawn["ancestral" if pipe.decoder.config.out_channels == 6 else "dpmsolver++2m"])
    with pytest.raises(ValueError, match=r"unknown sampler 'dpmsolver' \(did you mean .*\); choose from dpmsolver\+\+2m"):
        draw(pipe, sampler="dpmsolver")
    with pytest.raises(ValueError, match=r"dpmsolver\+\+2m needs at least 2 steps, got 1"):
        draw(pipe, sampler="dpmsolver++2m", decoder_num_inference_steps=1)
