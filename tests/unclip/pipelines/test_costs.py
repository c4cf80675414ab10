"""Memory and work: what is in memory when, what a stage costs, and what is not done at all."""

import time

import pytest
import torch
from conftest import TINY_DEFAULTS, tiny_networks
from diffusers import DPMSolverMultistepScheduler
from drawing import answer, close, draw
from pretend_device import DEVICE, Waits

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.diffusion.sampling import shift_timesteps
from unclip.runtime.profiling import Profile, measured_peak, peak_memory


def networks(pipe) -> dict[str, torch.nn.Module]:
    return {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


def present(pipe) -> set[str]:
    """The networks whose weights are in memory."""
    return {n for n, c in networks(pipe).items() if all(p.device.type != "meta" for p in c.parameters())}


def first(output) -> torch.Tensor:
    return next(iter(output.values()))


def test_low_memory_draws_the_same_with_the_working_stage_in_memory(every, tmp_path):
    every.save_pretrained(tmp_path / "saved")
    resident = type(every).from_pretrained(tmp_path / "saved", dtype=torch.float64)
    frugal = type(every).from_pretrained(tmp_path / "saved", dtype=torch.float64, low_memory=True)
    for pipe in (resident, frugal):
        pipe.set_progress_bar_config(disable=True)
    assert present(frugal) == set() and present(resident) == set(networks(resident))
    seen = {}

    def note(pipe, step, timestep, given):
        seen.setdefault(pipe.stage, present(pipe))
        return {}

    drawn = first(answer(frugal, callback_on_step_end=note))
    close(drawn, first(answer(resident)))
    assert present(frugal) == set(), "what came for a call leaves with it"
    work = {
        "prior": {"prior"},
        "inversion": {"text_proj", "decoder"},
        "decoder": {"text_proj", "decoder"},
        "upsampler_256": {"super_res_first"} | ({"super_res_last"} & set(networks(frugal))),
    }
    assert seen == {stage: work[stage] for stage in seen} and seen
    frugal.save_pretrained(tmp_path / "again")
    assert present(frugal) == set()
    again = type(every).from_pretrained(tmp_path / "again", dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    close(first(answer(again)), drawn)


def test_low_memory_is_shared_and_takes_a_dtype(tiny_folder):
    frugal = UnCLIPPipeline.from_pretrained(tiny_folder, low_memory=True).to(torch.float64)
    frugal.set_progress_bar_config(disable=True)
    resident = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float64)
    resident.set_progress_bar_config(disable=True)
    assert {c.dtype for c in networks(frugal).values()} == {torch.float64} and frugal.device == torch.device("cpu")
    close(draw(frugal), draw(resident))
    image = frugal("a star", size=64, output_type="pil").images[0]
    variations = UnCLIPImageVariationPipeline.from_pipe(frugal)
    assert variations(image, size=64, output_type="pt").images.isfinite().all() and present(variations) == set()
    assert frugal.upsample(draw(frugal, size=64).float(), 256).shape[-1] == 256 and present(frugal) == set()
    seen = frugal.clip.encode_image([image])
    assert present(frugal) == {"text_encoder", "image_encoder"} and seen.isfinite().all()


@pytest.mark.parametrize("what", ["load_lora_weights", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_what_needs_the_weights_is_refused_under_low_memory(what, tiny_folder):
    pipe = UnCLIPPipeline.from_pretrained(tiny_folder, low_memory=True)
    with pytest.raises(ValueError, match="without low_memory"):
        getattr(pipe, what)({})


def test_out_of_memory_is_one_line_and_the_pipeline_stays_usable(tiny):
    before = draw(tiny)
    with pytest.raises(MemoryError, match=r"stage decoder, which needed 5.278e\+04 GB more: draw fewer") as error:
        tiny("a star", size=64, height=2**21, width=2**21)
    assert len(str(error.value).splitlines()) == 1 and tiny.stage is None
    assert torch.equal(draw(tiny), before)


def test_a_profile_counts_and_times_each_stage(tiny):
    single, double = Profile(count=True), Profile(count=True)
    with single.watch(tiny):
        draw(tiny, 1)
    with double.watch(tiny):
        draw(tiny, 2)
    draw(tiny, 4)  # unwatched
    assert list(single.costs) == ["text_encoder", "prior", "decoder", "upsampler_256"]
    for stage in ("decoder", "upsampler_256"):
        assert double.costs[stage].flops == pytest.approx(2 * single.costs[stage].flops, rel=0.01)
        assert single.costs[stage].flops > 0
    assert all(c.seconds > 0 and c.memory > 0 for c in single.costs.values())


def test_a_profile_counts_the_priors_packed_layers_and_attention(tiny, monkeypatch):
    """As many operations as through plain layers and plain products."""

    def flops(**kwargs) -> int:
        profile = Profile(count=True)
        with profile.watch(tiny):
            draw(tiny, size=64, **kwargs)
        return profile.costs["prior"].flops

    tiny.set_attention("math")
    more = {"prior_num_inference_steps": 5}
    found, longer = flops(), flops(**more)
    monkeypatch.setattr("prior.cache.packed", lambda block, rows: block)
    assert found == flops() and longer == flops(**more) > found > 0
    tiny.set_attention("sdpa")
    assert flops() == found


def test_peak_memory_sees_what_came_and_went():
    with peak_memory() as idle:
        pass
    with peak_memory() as peak:
        block = torch.ones(2**24)  # 64 MiB
        time.sleep(0.02)
        del block
    assert peak[0] - idle[0] > 60 * 2**20


def test_the_peak_of_the_machine_is_above_a_small_products_rate():
    small = torch.ones(8, 8)
    start = time.perf_counter()
    for _ in range(100):
        small @ small
    rate = 100 * 2 * 8**3 / (time.perf_counter() - start)
    assert measured_peak() > rate


def test_pipelines_over_the_same_networks_know_of_a_dtype_together(tiny, monkeypatch):
    """None converts networks whose dtype was set in another one."""
    monkeypatch.setattr("unclip.pipelines.acceleration.fast_dtype", lambda device: torch.bfloat16)
    tiny.set_progress_bar_config(disable=True)
    converted = UnCLIPPipeline.from_pipe(tiny, dtype=torch.float64)
    draw(tiny)
    assert converted.decoder.dtype == tiny.decoder.dtype == torch.float64
    other = UnCLIPPipeline.from_pipe(tiny)
    tiny.to(torch.float32)
    draw(other)
    assert tiny.decoder.dtype == torch.float32


def test_a_slow_dtype_is_warned_of_once_with_its_factor(tiny, caplog, monkeypatch):
    asked = []
    monkeypatch.setattr("unclip.pipelines.acceleration.slowdown", lambda dtype: asked.append(dtype) or 7.25)
    draw(tiny)
    assert caplog.text == "", "float32 is what the others are measured by"
    pipe = UnCLIPPipeline.from_pipe(tiny, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    draw(pipe)
    draw(pipe)
    assert caplog.text.count("torch.bfloat16 takes 7.2 times as long as float32 on this CPU") == 1 and len(asked) == 1


def test_guidance_on_an_interval_asks_for_one_half_outside_it(pipe):
    seen = []

    def note(module, arguments, kwargs):
        seen.append((int(kwargs["timestep"]), len(kwargs["sample"])))

    handle = pipe.decoder.register_forward_pre_hook(note, with_kwargs=True)
    more = {"decoder_num_inference_steps": 6, "decoder_guidance_scale": 3.0}
    everywhere = draw(pipe, **more)
    timesteps = [t for t, _ in seen]
    assert {rows for _, rows in seen} == {2}
    seen.clear()
    assert torch.equal(draw(pipe, decoder_guidance_interval=(0.0, 1.0), **more), everywhere)
    seen.clear()
    partly = draw(pipe, decoder_guidance_interval=(0.3, 0.7), **more)
    assert seen == [(t, 2 if 300 <= t <= 700 else 1) for t in timesteps] and {rows for _, rows in seen} == {1, 2}
    handle.remove()
    never = draw(pipe, decoder_guidance_interval=(0.9995, 1.0), **more)  # above the highest timestep
    plain = draw(pipe, **(more | {"decoder_guidance_scale": 1.0, "decoder_guidance_interval": (0.0, 1.0)}))
    torch.testing.assert_close(never, plain, atol=1e-5, rtol=0)
    assert not torch.allclose(partly, plain, atol=1e-4) and not torch.allclose(partly, everywhere, atol=1e-4)
    for wrong in ((0.5, 0.5), (-0.1, 1), (0.2, 1.1), (0.2,), "0.2"):
        with pytest.raises(ValueError, match=r"decoder_guidance_interval must be \(low, high\)"):
            draw(pipe, decoder_guidance_interval=wrong)


def test_a_shift_moves_the_decoders_timesteps_alone(pipe):
    seen = []
    hook = pipe.decoder.register_forward_pre_hook(lambda m, a, kwargs: seen.append(int(kwargs["timestep"])), with_kwargs=True)
    pipe.decoder_scheduler = DPMSolverMultistepScheduler.from_config(pipe.decoder_scheduler.config, timestep_spacing="trailing")
    even = draw(pipe, decoder_num_inference_steps=4)
    assert seen == shift_timesteps(4, 1)
    seen.clear()
    assert torch.equal(draw(pipe, decoder_num_inference_steps=4, decoder_timestep_shift=1.0), even)
    seen.clear()
    assert not torch.allclose(draw(pipe, decoder_num_inference_steps=4, decoder_timestep_shift=3.0), even, atol=1e-4)
    assert seen == shift_timesteps(4, 3)
    hook.remove()
    for wrong in (0, -1, float("nan"), "3"):
        with pytest.raises(ValueError, match="decoder_timestep_shift must be from 0.01 to 100, got"):
            draw(pipe, decoder_timestep_shift=wrong)


def test_the_decoders_context_is_projected_once(pipe, monkeypatch):
    """Keys and values of the context, without what is padding in every row, before the loop: the same image, less work."""
    pipe = pipe.to(torch.float64)
    rows = []

    def note(module, arguments):
        rows.append(tuple(arguments[0].shape[:2]))

    layers = [m for n, m in pipe.decoder.named_modules() if n.endswith(("context_kv", "add_k_proj"))]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    more = {"decoder_num_inference_steps": 4, "decoder_guidance_interval": (0.3, 0.8)}
    for count in (1, 2):
        rows.clear()
        once, seen_once = draw(pipe, count, **more), list(rows)
        assert len(seen_once) == len(layers) > 0 and {r for r, _ in seen_once} == {2 * count}
        with monkeypatch.context() as patched:
            patched.setattr("unclip.runtime.attention.context_kv_cache", lambda network, context: {})
            rows.clear()
            close(draw(pipe, count, **more), once)
        assert len(rows) == 4 * len(layers) and rows[0][1] >= seen_once[0][1] + (count == 1)
    for handle in handles:
        handle.remove()


def test_no_step_of_any_stage_waits_for_the_device(monkeypatch):
    """On a GPU Python has to run ahead: what it waits for must not be more often when there are more steps."""
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # a module's parameters change kind

    def waits(steps: int) -> int:
        pipe = UnCLIPPipeline(**tiny_networks(), defaults=TINY_DEFAULTS)
        pipe.set_progress_bar_config(disable=True)
        names = ("prior_num_inference_steps", "decoder_num_inference_steps", "super_res_num_inference_steps")
        with Waits() as device:
            for network in networks(pipe).values():
                torch.nn.Module.to(network, DEVICE)
            moved = device.count
            pipe("a star", output_type="pt", upsampler_1024_num_inference_steps=steps, **dict.fromkeys(names, steps))
        return device.count - moved

    assert waits(3) == waits(6)
