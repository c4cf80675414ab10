"""The denoising loop and the training targets, tested by what must hold for any network."""

from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_device import DEVICE, Waits
from torch.utils._python_dispatch import TorchDispatchMode

from unclip.diffusion.guidance import apply_guidance
from unclip.diffusion.predictions import offset_x0, predict_x0, target
from unclip.diffusion.sampling import DenoisingOptions, denoise, noise, place_timesteps, shift_timesteps
from unclip.diffusion.schedules import (
    ancestral,
    ddim,
    dpm_solver,
    logit_normal_timesteps,
    schedule,
    uniform_timesteps,
)

KINDS = ("epsilon", "sample", "v_prediction")


@settings(max_examples=30)
@given(kind=st.sampled_from(KINDS), t=st.integers(1, 998), seed=st.integers(0, 1000))
def test_target_and_clean_are_inverse(kind, t, seed):
    g = torch.Generator().manual_seed(seed)
    plan = schedule(kind)
    clean, eps = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    steps = torch.tensor([t, t])
    plan.alphas_cumprod = plan.alphas_cumprod.double()
    noised = plan.add_noise(clean, eps, steps)
    wanted = target(plan, clean, eps, steps)
    torch.testing.assert_close(predict_x0(plan, wanted, noised, steps), clean, rtol=1e-6, atol=1e-6)
    moved = predict_x0(plan, offset_x0(plan, wanted, eps / 7, steps), noised, steps)
    torch.testing.assert_close(moved, clean + eps / 7, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_perfect_network_is_sampled_perfectly(kind, sampler):
    """A network that always predicts the clean image ends on it, from any noise and in any number of steps."""
    plan = schedule(kind)
    clean = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scheduler = sampler.from_config(plan.config, timestep_spacing="trailing")

    asked = []

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t))
        alpha = plan.alphas_cumprod.double()[int(t)]
        eps = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return {"sample": clean, "epsilon": eps, "v_prediction": alpha.sqrt() * eps - (1 - alpha).sqrt() * clean}[kind]

    for steps in (4, 10, 61):  # of 61 diffusers' own spacing makes 62, the last of them -1: noise alone
        asked.clear()
        drawn = denoise(perfect, torch.randn(2, 3, 4, 4, dtype=torch.float64), scheduler, steps)
        torch.testing.assert_close(drawn, clean, rtol=0, atol=0.02)
        assert len(asked) == steps and asked[0] == 999 and asked[-1] >= 0


@given(st.integers(1, 1000), st.sampled_from([DDIMScheduler, DDIMInverseScheduler, DPMSolverMultistepScheduler]))
def test_as_many_timesteps_as_were_asked_for(steps, sampler):
    scheduler = sampler.from_config(schedule("v_prediction").config, timestep_spacing="trailing")
    found = place_timesteps(scheduler, steps).tolist()
    assert len(set(found)) == len(found) == steps and min(found) >= 0
    even = zip(sorted(found, reverse=True), shift_timesteps(steps, 1), strict=True)
    assert all(abs(a - b) <= 1 for a, b in even), "but for the rounding of halves"


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1001, 2000])
def test_more_steps_than_levels_are_an_error_whatever_the_shift(steps, shift):
    plan = DPMSolverMultistepScheduler.from_config(schedule("v_prediction").config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=f"steps must be at most 1000, got {steps}"):
        denoise(lambda x, t: x, torch.randn(1, 3, 2, 2), plan, steps, DenoisingOptions(shift=shift))


@given(st.integers(1, 1000), st.floats(0.02, 50))
def test_shift_timesteps_fall_from_the_top_and_never_repeat(steps, shift):
    found = shift_timesteps(steps, shift)
    assert len(found) == steps and found[0] == 999 and found[-1] >= 0
    assert all(a > b for a, b in zip(found, found[1:], strict=False))
    even = shift_timesteps(steps, 1)
    assert all(a >= b if shift >= 1 else a <= b for a, b in zip(found, even, strict=True))
    other = shift_timesteps(steps, 1.1 * shift)
    assert all(a <= b for a, b in zip(found, other, strict=True)), "the more it is shifted, the longer noise is high"


def test_no_shift_is_trailing_spacing_and_a_shift_ends_on_the_image_too():
    plan = schedule("v_prediction")
    even, shifted = (DPMSolverMultistepScheduler.from_config(plan.config, timestep_spacing="trailing") for _ in range(2))
    for steps in (5, 20, 333):
        even.set_timesteps(steps)
        assert shift_timesteps(steps, 1) == even.timesteps.tolist()
    clean, seen = torch.randn(2, 3, 4, 4, dtype=torch.float64), []

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(int(t))
        alpha = plan.alphas_cumprod.double()[int(t)]
        return alpha.sqrt() * (x - alpha.sqrt() * clean) / (1 - alpha).sqrt() - (1 - alpha).sqrt() * clean

    drawn = denoise(perfect, torch.randn(2, 3, 4, 4, dtype=torch.float64), shifted, 8, DenoisingOptions(shift=3))
    torch.testing.assert_close(drawn, clean, rtol=0, atol=0.02)
    assert seen == shift_timesteps(8, 3)
    ddim = DDIMScheduler.from_config(plan.config, timestep_spacing="trailing")  # does not accept timesteps
    start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(denoise(perfect, start, ddim, 8, DenoisingOptions(shift=3)), denoise(perfect, start, ddim, 8))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *product([ddim, dpm_solver, partial(dpm_solver, order=3)], ["epsilon", "sample", "v_prediction"]),
        *product([ancestral], ["epsilon", "sample"]),
    ],
)
def test_every_step_says_what_sample_its_prediction_stands_for(make, kind, guidance):
    plan = schedule(kind)
    scheduler = make(plan if make in (ddim, ancestral) else plan.config)
    clean, said = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1, []

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sample = plan.alphas_cumprod.double()[int(t)], clean.repeat(len(x) // 2, 1, 1, 1)
        noise = (x - alpha.sqrt() * sample) / (1 - alpha).sqrt()
        answer = target(plan, sample, noise, t.expand(len(x)))
        return torch.cat([answer, torch.zeros_like(x)], 1) if make is ancestral else answer

    def note(i, t, latents, expected):
        said.append(expected())
        return latents

    start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    drawn = denoise(perfect, start, scheduler, 5, DenoisingOptions(guidance=guidance, on_step=note))
    assert len(said) == 5
    for expected in (*said, drawn):
        torch.testing.assert_close(expected, clean, rtol=0, atol=0.02)


def test_guidance_of_one_is_no_guidance_and_equal_halves_are_fixed():
    prediction = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(apply_guidance(prediction, 3, 1.0), prediction[2:])
    torch.testing.assert_close(apply_guidance(torch.cat([prediction] * 2), 3, 7.5), prediction)
    variance = torch.randn(4, 6, 2, 2)
    assert torch.equal(apply_guidance(variance, 3, 5.0)[:, 3:], variance[2:, 3:])


def test_only_guidance_doubles_the_batch():
    sizes = []

    def network(x, t):
        sizes.append(len(x))
        return x

    for guidance in (0.0, 1.0, 2.0):
        denoise(network, torch.randn(3, 3, 4, 4), DDIMScheduler(), 2, DenoisingOptions(guidance=guidance))
    assert sizes == [6, 6, 3, 3, 6, 6]


def test_a_step_reads_no_number_from_a_tensor():
    """On a GPU that waits for all that the GPU has to do. Schedulers read theirs: this one does nothing."""
    read, timesteps = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal"):
                read.append(function)
            return function(*args, **(kwargs or {}))

    def step(prediction, t, latents, eta=0.0, generator=None):
        timesteps.append(t)
        return SimpleNamespace(prev_sample=latents)

    scheduler, sizes = DDIMScheduler(timestep_spacing="trailing"), []
    scheduler.step = step
    with Watch():
        denoise(
            lambda x, t: sizes.append(len(x)) or x,
            torch.randn(1, 3, 2, 2),
            scheduler,
            10,
            DenoisingOptions(
                guidance=3.0,
                interval=(299.0, 699.0),
                on_step=lambda i, t, x, clean: x,
                resample=2,
                renoise=lambda i, x: x,
            ),
        )
    assert not read
    assert all(isinstance(t, torch.Tensor) for t in timesteps), "as schedulers are given them"
    assert sizes == [2 if 299 <= t <= 699 else 1 for t in timesteps] and set(sizes) == {1, 2}


@pytest.mark.parametrize("make", [ddim, dpm_solver, partial(dpm_solver, order=3), partial(dpm_solver, clip=True), ancestral])
def test_no_step_waits_for_the_device(make):
    """What a GPU would wait for at every step, with the schedulers that the pipelines draw by."""

    def waits(steps: int) -> int:
        plan = schedule("sample")
        scheduler = make(plan if make in (ddim, ancestral) else plan.config)
        with Waits() as device:
            start = torch.randn(1, 3, 4, 4).to(DEVICE)
            denoise(lambda x, t: torch.cat([x] * (2 if make is ancestral else 1), 1) * 0.5 + 0 * t, start, scheduler, steps)
        return device.count

    assert waits(12) == waits(4) > 0


def test_each_generator_is_a_rows_own_in_every_dtype():
    def generators():
        return [torch.Generator().manual_seed(s) for s in (1, 2)]

    both = noise((2, 3, 4, 4), generators(), torch.device("cpu"), torch.float32)
    alone = noise((1, 3, 4, 4), generators()[1:], torch.device("cpu"), torch.float32)
    assert torch.equal(both[1:], alone)
    half = noise((2, 3, 4, 4), generators(), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(half, both.bfloat16())


@given(u=st.floats(0, 1, exclude_max=True, width=32))
def test_timesteps_stay_on_the_schedule(u):
    for draw in (logit_normal_timesteps, uniform_timesteps):
        assert 0 <= int(draw(torch.tensor([u]), 1000)) < 1000


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        denoise(lambda x, t: x, torch.randn(1, 3, 2, 2), DDIMScheduler(), 0)
