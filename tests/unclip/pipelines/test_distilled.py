"""The few-step decoder: what its targets are, that it learns them, and what a pipeline does with it."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_DEFAULTS, randomise, seeds, tiny_networks
from drawing import close, draw
from peft import LoraConfig
from PIL import Image
from running import run_here, state
from safetensors.torch import save_file

from decoder import Decoder, UnCLIPTextProjModel
from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.data.examples import seeded_noise
from unclip.diffusion.sampling import shift_timesteps
from unclip.io.checkpoints import save_components
from unclip.io.hub import DISTILLED_FILE
from unclip.pipelines.distilled import Distilled, fingerprint
from unclip.runtime.config import ConfigError
from unclip.training.export import export_pipeline
from unclip.training.objectives.decoder_distill import DecoderDistillObjective, solve_x0_and_noise

SMALL = {"channels": [16, 32], "blocks": [1, 1], "attention": [False, True], "head_dim": 16}
SMALL |= {"cross_attention_dim": 32, "time_embed_dim": 32}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return run_here("clip", tmp_path_factory.mktemp("clip"), "max_steps=1", "batch_size=2")


@pytest.fixture(scope="module")
def base(clip, tmp_path_factory):
    """A decoder with something to say under guidance, as a run would leave it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    parts = {"decoder": Decoder(**SMALL), "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=32, **PROJECTED)}
    save_components(folder / "final", {n: randomise(p, scale=0.1) for n, p in parts.items()})
    return folder


PROJECTED = {"time_embed_dim": 32, "cross_attention_dim": 32, "embedding_scale": 32**0.5}


def objective(clip, **settings) -> DecoderDistillObjective:
    settings = {"guidance": 3.0, "evaluations": 2, "teacher_steps": 8, "embedding_noise": 0.0} | settings
    found = DecoderDistillObjective(SMALL, {"path": "shapes"}, 0, str(clip / "final"), lora={"rank": 4}, **settings)
    for name, network in found.trained.named_children():
        randomise(network, seed=len(name), scale=0.1)
    found.adapt()
    return found


def batch(found, count: int = 6) -> dict:
    return found.to_tensors(torch.utils.data.default_collate([found.examples[n] for n in range(count)]))


def adapted(found, scale: float = 0.1):
    for name, parameter in found.trained["decoder"].named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale, generator=torch.Generator().manual_seed(len(name)))
    return found


def test_two_noise_levels_of_one_line_give_picture_and_noise():
    g = torch.Generator().manual_seed(0)
    picture, rest = torch.randn(2, 5, 3, 4, 4, generator=g, dtype=torch.float64)
    levels = torch.rand(2, 5, 1, 1, 1, generator=g, dtype=torch.float64)
    first, second = (a.sqrt() * picture + (1 - a).sqrt() * rest for a in levels)
    found = solve_x0_and_noise(first, levels[0], second, levels[1])
    close(found[0], picture)
    close(found[1], rest)


def test_parts_of_one_step_are_guidance_distillation(clip):
    """Where a part is the teacher's own step, the target of the first one is the guided prediction itself."""
    found = adapted(objective(clip, evaluations=8, drop_image=0.0, drop_text=0.0))
    examples = batch(found)
    rows = len(examples["image"])
    with torch.no_grad():
        trajectory = found.teacher_trajectory(examples)
        losses, timesteps = found.student_losses(trajectory)
        assert (timesteps[:rows] == 999).all() and torch.equal(trajectory.latents[0], noise_of(trajectory, examples))
        student = found.predict(trajectory.latents[0], timesteps[:rows], trajectory.conditions, trajectory.inpainting)
        with found.without_adapter():
            empty = found.base.conditions(found.frozen.text([""] * rows), null_of(found, rows))
            conditional, unconditional = (
                found.predict(trajectory.latents[0], timesteps[:rows], conditions, trajectory.inpainting)
                for conditions in (trajectory.conditions, empty)
            )
    wanted = (student - (unconditional + 3 * (conditional - unconditional))).square().mean((1, 2, 3))
    torch.testing.assert_close(losses[:rows], wanted, rtol=1e-3, atol=1e-5)


def noise_of(trajectory, examples) -> torch.Tensor:
    return seeded_noise(0, examples["index"], trajectory.images)


def null_of(found, rows: int) -> torch.Tensor:
    return found.trained["text_proj"].learned_classifier_free_guidance_embeddings.expand(rows, -1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_whoever_answers_with_the_targets_draws_the_teachers_pictures(clip, shift):
    """Steps of DDIM on the targets lead from part to part, at a pipeline's levels, and end in what the guided decoder draws."""
    found = objective(clip, evaluations=4, timestep_shift=shift)
    trajectory = found.teacher_trajectory(batch(found, 2))
    predict, found.predict = found.predict, lambda noised, *_: noised
    found.base.squared_error = lambda predicted, wanted, timesteps: wanted
    targets, starts = found.student_losses(trajectory)
    assert starts.view(4, 2)[:, 0].tolist() == shift_timesteps(4, shift)
    remaining = iter(targets.view(4, 2, *targets.shape[1:]))
    found.predict = lambda *_: next(remaining)
    close(found.sample_student(trajectory, 4), trajectory.latents[-1], 1e-4)
    found.predict = predict
    with found.without_adapter(), torch.no_grad():
        again = found.teacher_trajectory(batch(found, 2))
    assert torch.equal(again.latents, trajectory.latents) and trajectory.latents.isfinite().all()


def test_a_decoder_that_knows_the_picture_has_nothing_to_learn(clip):
    """It answers with one picture from everywhere: the way is straight, and one step goes as far as many."""
    found = objective(clip)
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1

    def knows(seen, timesteps, *_, **__):
        level = found.schedule.alphas_cumprod[timesteps.long()][:, None, None, None]
        return type("Answer", (), {"sample": (level.sqrt() * seen[:, :3] - picture) / (1 - level).sqrt()})

    found.trained["decoder"].forward = knows
    with torch.no_grad():
        losses, _ = found.student_losses(found.teacher_trajectory(batch(found, 16)))
    assert losses.max() < 1e-6


LESSONS = ("objective.resolution=16", "batch_size=8", "warmup_steps=0", "learning_rate=5e-3", "cooldown=0.5", "ema=0")


def judged(folder, clip, base, *settings) -> tuple[dict, dict]:
    """Held-out metrics of the untrained adapter and of the trained one."""
    common = (f"objective.clip={clip}", f"init_from={base}", *LESSONS, "objective.lora={rank: 8}", *settings)
    found = []
    for name, more in (("none", ("max_steps=1", "learning_rate=0", "validate_every=1")), ("run", ())):
        run = run_here("decoder_distill", folder / name, *common, *more)
        found.append(json.loads((run / "log.jsonl").read_text().splitlines()[-1]))
    return tuple(found)


def test_the_student_learns_what_the_teacher_says(clip, base, tmp_path):
    before, after = judged(tmp_path, clip, base, "max_steps=40", "validate_every=40")
    assert after["loss"] < 0.8 * before["loss"] and after["apart"] < 0.8 * before["apart"]
    assert (tmp_path / "run" / "final" / DISTILLED_FILE).stat().st_size < 200_000


@pytest.mark.slow
def test_the_student_comes_nearer_the_teachers_pictures(clip, tmp_path):
    """Of a teacher that has seen pictures: what it draws lies where the student has learned. Measured: .141 to .054."""
    settings = (f"objective.clip={clip}", *LESSONS, "max_steps=400")
    base = run_here("decoder", tmp_path / "base", *settings, "objective.drop_both=0.1")
    before, after = judged(tmp_path, clip, base, "max_steps=400", "validate_every=400")
    assert after["apart"] < 0.5 * before["apart"]


def test_it_resumes_exports_and_is_drawn_with(clip, base, tmp_path):
    common = (f"objective.clip={clip}", f"init_from={base}", "objective.resolution=16", "batch_size=2", "warmup_steps=0")
    settings = (*common, "max_steps=4", "save_every=1", "learning_rate=1e-2")
    run = run_here("decoder_distill", tmp_path / "run", *settings)
    broken = run_here("decoder_distill", tmp_path / "broken", *settings, stop_at=2)
    assert not (broken / "final").exists()
    run_here("decoder_distill", broken, *settings)
    one, two = state(run), state(broken)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert all("lora_" in name for name in one)

    UnCLIPPipeline(**tiny_networks(), defaults=TINY_DEFAULTS).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="was distilled from the decoder .*, but the pipeline's is"):
        export_pipeline([tmp_path / "tiny", run], tmp_path / "wrong")
    folder = export_pipeline([tmp_path / "tiny", base, run], tmp_path / "out")
    pipe = UnCLIPPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.samplers[-1] == "distilled" and pipe._distilled.evaluations == 2
    drawn = draw(pipe, sampler="distilled", size=64, decoder_num_inference_steps=None)
    assert drawn.isfinite().all()
    again = export_pipeline([folder, tmp_path / "tiny"], tmp_path / "another")  # its decoder is the tiny one's now
    assert not (again / DISTILLED_FILE).exists() and (export_pipeline([folder], tmp_path / "copy") / DISTILLED_FILE).exists()


def test_it_goes_on_from_another_adapter(clip, base, tmp_path):
    common = (f"objective.clip={clip}", f"init_from={base}", "objective.resolution=16", "batch_size=2", "warmup_steps=0")
    common += ("objective.lora={rank: 2}",)
    one = run_here("decoder_distill", tmp_path / "one", *common, "max_steps=2", "learning_rate=1e-2") / "final" / DISTILLED_FILE
    for adapter in (one, one.parent.parent):
        kept = (f"objective.adapter={adapter}", "max_steps=1", "learning_rate=0", "objective.lora={rank: 2, alpha: 6}")
        other = run_here("decoder_distill", tmp_path / f"from_{adapter.name}", *common, *kept) / "final" / DISTILLED_FILE
        one_is, other_is = Distilled.load(one), Distilled.load(other)
        assert one_is.factors.keys() == other_is.factors.keys()
        for layer, (down, up) in one_is.factors.items():
            assert torch.equal(down, other_is.factors[layer][0]) and down.any() and up.any()
            change, same = one_is.scale * up, other_is.scale * other_is.factors[layer][1]
            torch.testing.assert_close(change, same, rtol=2e-3, atol=1e-6)
    with pytest.raises(ConfigError, match="objective.adapter: it changes .* layers at rank 2, and this run .* at rank 3"):
        run_here("decoder_distill", tmp_path / "wide", *common, f"objective.adapter={one}", "objective.lora={rank: 3}")
    with pytest.raises(ConfigError, match="holds no decoder_distilled.safetensors"):
        run_here("decoder_distill", tmp_path / "none", *common, f"objective.adapter={base}")


@pytest.fixture
def few(tiny_folder, tmp_path) -> UnCLIPPipeline:
    """The tiny pipeline with an adapter of random changes, made for 4 steps, through a folder."""
    pipe = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    factors = {}
    for name in ("down.1.0.block.conv_in", "middle.0.attention.attention.qkv"):
        out, inside, *kernel = pipe.decoder.get_submodule(name).weight.shape
        ones = [1] * len(kernel)
        factors[name] = (0.1 * torch.randn(2, inside, *kernel, generator=g), 0.1 * torch.randn(out, 2, *ones, generator=g))
    pipe._distilled = Distilled(factors, scale=2.0, evaluations=4, guidance=3.0, decoder=fingerprint(pipe.decoder))
    pipe.save_pretrained(tmp_path / "few")
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "few", dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALLEST = {"size": 64}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, None])
def test_as_few_evaluations_as_asked_each_of_one_row(few, steps):
    draw(few, **SMALLEST)  # takes its layout in memory
    seen = []
    made = few._distilled.network(few.decoder)
    made.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["sample"])), with_kwargs=True)
    drawn = draw(few, sampler="distilled", decoder_num_inference_steps=steps, **SMALLEST)
    assert seen == [1] * (steps or 4) and drawn.isfinite().all()
    assert few._distilled.network(few.decoder) is made, "made once"


def test_it_is_the_decoder_with_its_weights_changed(few):
    """The same as an unguided DDIM of a decoder whose weights are W + s B A; the full one stays what it was."""
    full = draw(few, **SMALLEST)
    drawn = draw(few, sampler="distilled", decoder_num_inference_steps=4, **SMALLEST)
    changed = UnCLIPPipeline.from_pipe(few, decoder=Decoder(**few.decoder.config).to(torch.float64).eval())
    assert "distilled" not in changed.samplers, "another decoder"
    changed.decoder.load_state_dict(few.decoder.state_dict())
    for name, (down, up) in few._distilled.factors.items():
        weight = changed.decoder.get_submodule(name).weight
        weight.data += (2.0 * up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)
    changed._distilled = replace(few._distilled, factors={})  # for its settings: unguided, on its own steps
    close(draw(changed, sampler="distilled", decoder_num_inference_steps=4, **SMALLEST), drawn, 1e-6)
    assert (drawn - full).abs().max() > 1e-3 and torch.equal(draw(few, **SMALLEST), full)
    names = dict(few.decoder.named_parameters())
    made = dict(few._distilled.network(few.decoder).named_parameters())
    assert sum(p is not names[n] for n, p in made.items()) <= 2, "what the adapter leaves alone is shared"


def test_it_follows_the_adapters_that_the_decoder_is_given(few):
    settings = {"sampler": "distilled", **SMALLEST}
    bare, made = draw(few, **settings), few._distilled.network(few.decoder)
    few.decoder.add_adapter(LoraConfig(r=2, target_modules=["qkv", "conv_in"]), "style")
    for name, parameter in few.decoder.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.ones_like(parameter)
    tuned = draw(few, **settings)
    assert (tuned - bare).abs().max() > 1e-3 and few._distilled.network(few.decoder) is not made
    few.set_adapters("style", 0.5)
    halved = draw(few, **settings)
    assert min((halved - other).abs().max() for other in (bare, tuned)) > 1e-4
    few.fuse_lora(components=["decoder"])
    close(draw(few, **settings), halved, 1e-6)  # the distilled change is added in float32
    few.unfuse_lora(components=["decoder"])
    few.set_adapters("style", 1.0)
    close(draw(few, **settings), tuned, 1e-6)
    few.decoder.disable_adapters()
    close(draw(few, **settings), bare)
    few.decoder.enable_adapters()
    few.unload_lora_weights()
    close(draw(few, **settings), bare)


def test_inversion_is_always_the_full_decoders(few):
    pipe = UnCLIPImageVariationPipeline.from_pipe(few)
    draw(few, **SMALLEST)  # takes its layout in memory
    called = []
    few._distilled.network(few.decoder).register_forward_pre_hook(lambda *_: called.append(1))
    picture = Image.new("RGB", (64, 64), "red")
    settings = {"size": 64, "output_type": "pt", "generator": seeds(0)}
    pipe(picture, eta=0.0, decoder_num_inference_steps=2, **settings)
    assert not called
    pipe(picture, sampler="distilled", **settings)
    assert len(called) == 4
    with pytest.raises(ValueError, match="eta inverts the image by DDIM"):
        pipe(picture, eta=0.0, sampler="distilled", **settings)


def test_low_memory_draws_the_same_and_keeps_nothing(few, tmp_path):
    frugal = UnCLIPPipeline.from_pretrained(tmp_path / "few", dtype=torch.float64, low_memory=True)
    frugal.set_progress_bar_config(disable=True)
    settings = {"sampler": "distilled", "decoder_num_inference_steps": 2, **SMALLEST}
    close(draw(frugal, **settings), draw(few, **settings))
    assert frugal._distilled._cached is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"decoder_num_inference_steps": 5}, "was made for 4 steps: decoder_num_inference_steps is 5"),
        ({"decoder_num_inference_steps": 0}, "at least 1, got 0"),
        (
            {"decoder_guidance_scale": 2.0},
            "its own of scale 3 at timesteps of its own: decoder_guidance_scale cannot be chosen, got 2.0",
        ),
        ({"decoder_guidance_interval": (0.1, 1)}, "decoder_guidance_interval cannot be chosen"),
        ({"decoder_timestep_shift": 2.0}, "at timesteps of its own: decoder_timestep_shift cannot be chosen, got 2.0"),
    ],
)
def test_what_it_cannot_be_asked_is_refused(few, asked, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        few("a star", sampler="distilled", size=64, **asked)


def test_what_is_no_distilled_decoder_is_refused(tiny, few, tmp_path):
    with pytest.raises(ValueError, match="no distilled decoder: sampler must be one of dpmsolver"):
        draw(tiny, sampler="distilled")
    save_file({"x": torch.ones(1)}, tmp_path / "few" / DISTILLED_FILE)
    with pytest.raises(ValueError, match="is not a distilled decoder"):
        UnCLIPPipeline.from_pretrained(tmp_path / "few")
    few._distilled.factors = {"nowhere": few._distilled.factors["down.1.0.block.conv_in"]}
    with pytest.raises(ValueError, match="the full one has no nowhere"):
        draw(few, sampler="distilled", decoder_num_inference_steps=1)


def test_settings_that_cannot_be_are_named(clip):
    with pytest.raises(ConfigError, match="a multiple of objective.evaluations, got 8 and 3"):
        objective(clip, evaluations=3)
    with pytest.raises(ConfigError, match="guidance must be at least 1, got 0"):
        objective(clip, guidance=0.5)
    with pytest.raises(ConfigError, match="timestep_shift must be from 0.01 to 100, got 0"):
        objective(clip, timestep_shift=0)
