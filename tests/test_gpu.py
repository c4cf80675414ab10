"""On a CUDA device, which `pytest -m gpu -n 0` asks for: what the CPU's tests cannot see."""

import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import seeds
from drawing import close
from running import run_here, state

from unclip import UnCLIPPipeline
from unclip.runtime.profiling import Profile
from unclip.training.plot import read_log

pytestmark = pytest.mark.gpu
PROMPTS = ["a star", "two red rings beside a moon"]


@pytest.fixture(autouse=True)
def anew(exact):
    """A precision for each run."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def load(tiny_folder):
    def loaded(dtype=torch.float32, **settings) -> UnCLIPPipeline:
        pipe = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=dtype, **settings).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return loaded


def images(pipe, prompts=PROMPTS, **settings):
    return pipe(prompts, generator=seeds(*range(len(prompts))), output_type="pt", **settings).images.cpu()


def test_it_draws_what_the_cpu_draws(load, tiny):
    close(images(load()), images(tiny), 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_draw_nearly_the_same(load, dtype):
    wanted, drawn = images(load(), size=64), images(load(dtype), size=64)
    assert (wanted - drawn).abs().mean() < 0.02


def test_it_takes_bfloat16_unless_it_is_told_otherwise(load):
    pipe = load(None)
    images(pipe, size=64)
    assert pipe.decoder.dtype == pipe.prior.dtype == torch.bfloat16
    assert pipe.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_compiled_it_draws_the_same(load):
    """CUDA graphs write into the same memory at every step, and samplers keep what earlier steps said."""
    pipe = load()
    settings = {"decoder_num_inference_steps": 6, "size": 256}
    wanted = [images(pipe, [prompt], **settings) for prompt in PROMPTS]
    pipe.compile()
    for _ in range(3):  # warm-up, recording, replay
        for prompt, image in zip(PROMPTS, wanted, strict=True):
            close(images(pipe, [prompt], **settings), image, 2e-3)


def waits(work) -> int:
    """How often Python waited for the GPU."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in said)


@pytest.mark.parametrize("sampler", [None, "ddim"])
def test_no_step_waits_for_the_gpu(load, sampler):
    pipe = load(torch.bfloat16)

    def draw_in(steps: int) -> None:
        names = ("prior", "decoder", "super_res")
        count = {f"{name}_num_inference_steps": steps for name in names} | {"upsampler_1024_num_inference_steps": steps}
        pipe(PROMPTS, generator=torch.Generator("cuda").manual_seed(0), output_type="pt", sampler=sampler, **count)

    for steps in (4, 12):  # what the first call of a length waits for is no step's
        draw_in(steps)
    few, many = (waits(lambda steps=steps: draw_in(steps)) for steps in (4, 12))
    assert few == many, f"{few} times in 4 steps a stage, {many} times in 12"


def test_low_memory_draws_the_same_in_less(load):
    wanted, drawn = {}, {}
    for found, frugal in ((wanted, False), (drawn, True)):
        torch.cuda.empty_cache()
        pipe = load(low_memory=frugal)
        with (profile := Profile("cuda")).watch(pipe):
            found["image"] = images(pipe, size=64)
        found["bytes"] = profile.costs["text_encoder"].memory
        del pipe
    close(drawn["image"], wanted["image"], 1e-5)
    assert drawn["bytes"] < wanted["bytes"]


def test_out_of_memory_is_one_line_and_the_pipeline_goes_on(load):
    pipe = load()
    wanted = images(pipe)
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**23) / whole)
    try:
        with pytest.raises(MemoryError, match="out of memory in the stage .*, which needed .* more: draw fewer"):
            images(pipe, PROMPTS * 8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    close(images(pipe), wanted, 1e-5)


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler_256", "clip"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_stopped_is_the_unbroken_run(tmp_path, tiny_folder, stage, optimizer):
    """As far as a GPU's sums, whose order is not always the same, let it be."""
    settings = ("max_steps=6", "save_every=3", f"optimizer={optimizer}", "precision=no")
    settings += (f"objective.clip={tiny_folder}",) if stage in ("prior", "decoder") else ()
    unbroken = run_here(stage, tmp_path / "unbroken", *settings)
    broken = run_here(stage, tmp_path / "broken", *settings, stop_at=3)
    run_here(stage, tmp_path / "broken", *settings)
    one, other = state(unbroken), state(broken)
    assert one.keys() == other.keys()
    for name in one:
        close(one[name].float(), other[name].float(), 1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_falls_in_sixteen_bits(tmp_path, tiny_folder, precision):
    run = run_here("decoder", tmp_path / "run", "max_steps=60", f"precision={precision}", f"objective.clip={tiny_folder}")
    losses = [row["loss"] for row in read_log(run)["train"]]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_command_draws_and_says_what_it_cost(tiny_folder, tmp_path, run):
    out = tmp_path / "star.png"
    result = run("-m", "unclip", "generate", "a star", "--model", tiny_folder, "--out", out, "--profile")
    assert result.returncode == 0, result.stderr
    assert out.is_file() and "of peak" in result.stderr
