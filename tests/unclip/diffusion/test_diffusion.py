"""Prediction targets, weights and the variational bound, beside diffusers' schedulers and torch's distributions."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from pretend_device import DEVICE, PretendDevice
from torch.distributions import Normal, kl_divergence

from unclip.diffusion.predictions import offset_x0, predict_x0, target
from unclip.diffusion.schedules import (
    ancestral,
    log_discrete_normal,
    logit_normal_timesteps,
    schedule,
    snr_weight,
    uniform_timesteps,
    variational_bound,
)
from unclip.runtime.config import ConfigError

KINDS = ("epsilon", "sample", "v_prediction")


def drawn(count: int = 6):
    g = torch.Generator().manual_seed(0)
    clean = (torch.randint(0, 256, (count, 3, 4, 4), generator=g) / 127.5 - 1).double()
    noise = torch.randn(count, 3, 4, 4, generator=g, dtype=torch.float64)
    return clean, noise, torch.linspace(1, 997, count).long()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_prediction_stands_for_is_what_it_was_made_from(kind):
    clean, noise, t = drawn()
    scheduler = schedule(kind)
    noised = scheduler.add_noise(clean, noise, t)
    torch.testing.assert_close(
        predict_x0(scheduler, target(scheduler, clean, noise, t), noised, t), clean, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_clean_images_error_alike_for_every_prediction(kind):
    clean, noise, t = drawn()
    scheduler = schedule(kind)
    by = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = target(scheduler, clean, noise, t)
    wrong = offset_x0(scheduler, right, by, t)
    weight = snr_weight(scheduler, t, 5.0)
    found = weight * (wrong - right).square().mean((1, 2, 3))
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    torch.testing.assert_close(found.float(), snr.clamp(max=5) * by.square().mean((1, 2, 3)).float(), rtol=2e-3, atol=0)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ConfigError, match="unknown prediction_type 'v_predict' \\(did you mean 'v_prediction'"):
        schedule("v_predict")


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_the_bound_is_the_divergence_of_diffusers_posterior(kind):
    """Mean and log variance of `DDPMScheduler.step` and `_get_variance`, the divergence by torch.distributions."""
    clean, noise, t = (x.float() if x.is_floating_point() else x for x in drawn())
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False, variance_type="learned_range"
    )
    noised = scheduler.add_noise(clean, noise, t)
    g = torch.Generator().manual_seed(2)
    prediction = target(scheduler, clean, noise, t) + 0.3 * torch.randn(clean.shape, generator=g)
    share = torch.rand(clean.shape, generator=g) * 2 - 1
    found = variational_bound(schedule(kind), prediction, share, clean, noised, t)
    for n, step in enumerate(t.tolist()):
        learned = scheduler._get_variance(step, predicted_variance=share[n])
        smallest = scheduler._get_variance(step, predicted_variance=torch.full_like(share[n], -1.0))
        moved, fresh = [], torch.randn(noised[n].shape, generator=torch.Generator().manual_seed(7))
        right = target(scheduler, clean, noise, t)[n]
        for guess, variance, log_variance in (
            (prediction[n], share[n], learned),
            (right, torch.full_like(right, -1.0), smallest),
        ):
            drawn_with = torch.Generator().manual_seed(7)
            answer = scheduler.step(torch.cat([guess, variance])[None], step, noised[n : n + 1], generator=drawn_with)
            deviation = (0.5 * log_variance).exp()
            moved.append(Normal((answer.prev_sample[0] - deviation * fresh).double(), deviation.double()))
        wanted = kl_divergence(moved[1], moved[0]).mean() / math.log(2)
        torch.testing.assert_close(found[n].double(), wanted, rtol=2e-2, atol=1e-4)


def test_the_bound_is_zero_for_the_posterior_itself():
    clean, noise, t = drawn()
    scheduler = schedule("sample")
    noised = scheduler.add_noise(clean, noise, t)
    found = variational_bound(scheduler, clean, -torch.ones_like(clean), clean, noised, t)
    torch.testing.assert_close(found, torch.zeros_like(found))


def test_the_256_levels_of_a_pixel_are_all_there_is():
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, deviation in ((0.0, 0.1), (-0.99, 0.02), (1.0, 0.5), (0.3, 0.003)):
        log_variance = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
        assert float(log_discrete_normal(values, torch.tensor(mean).double(), log_variance).exp().sum()) == pytest.approx(
            1, abs=1e-6
        )


def test_at_the_first_timestep_the_bound_is_a_likelihood():
    clean, noise, _ = drawn()
    scheduler, t = schedule("sample"), torch.zeros(len(clean), dtype=torch.long)
    noised = scheduler.add_noise(clean, noise, t)
    near = variational_bound(scheduler, clean, torch.zeros_like(clean), clean, noised, t)
    far = variational_bound(scheduler, clean + 0.1, torch.zeros_like(clean), clean, noised, t)
    assert (near > 0).all() and (near < far).all()


def test_a_device_without_float64_is_told_the_same_numbers(monkeypatch):
    """To the bit: what needs float64 is computed on the CPU."""
    clean, noise, _ = (x.float() for x in drawn())
    random = torch.rand(len(clean), generator=torch.Generator().manual_seed(3))
    share = torch.rand(clean.shape, generator=torch.Generator().manual_seed(4)) * 2 - 1

    def numbers(clean, noise, random, share) -> list[torch.Tensor]:
        scheduler = schedule("v_prediction")
        t = logit_normal_timesteps(random, 1000)
        noised = scheduler.add_noise(clean, noise, t)  # which takes the schedule's tables along
        prediction = target(scheduler, clean, noise, t) + 0.1 * noise
        bound = variational_bound(scheduler, prediction, share, clean, noised, t)
        return [t, uniform_timesteps(random, 1000), snr_weight(scheduler, t, 5.0), bound]

    expected = numbers(clean, noise, random, share)
    monkeypatch.setattr("unclip.diffusion.schedules.WITHOUT_DOUBLES", (DEVICE.type,))
    with PretendDevice(doubles=False):
        with pytest.raises(TypeError, match="no float64"):
            random.to(DEVICE).double()
        found = numbers(*(x.to(DEVICE) for x in (clean, noise, random, share)))
        assert all(x.device == DEVICE for x in found)
        found = [x.cpu() for x in found]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_learned_variance_is_drawn_with_karlos_scheduler():
    found = ancestral(schedule("epsilon"))
    assert (found.config.variance_type, found.config.prediction_type) == ("learned_range", "epsilon")
    torch.testing.assert_close(found.alphas_cumprod, schedule("epsilon").alphas_cumprod)
