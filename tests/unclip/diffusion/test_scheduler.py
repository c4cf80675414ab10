"""Our `UnCLIPScheduler` has the numbers of diffusers' one, and does what that one cannot."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip import UnCLIPScheduler
from unclip.diffusion.sampling import DenoisingOptions, denoise

theirs = pytest.importorskip("diffusers.schedulers.scheduling_unclip").UnCLIPScheduler
CONFIGS = [
    {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0},
    {"variance_type": "fixed_small_log", "prediction_type": "epsilon", "clip_sample": False},
    {"variance_type": "learned_range", "prediction_type": "epsilon"},
    {"variance_type": "learned_range", "prediction_type": "sample", "num_train_timesteps": 100},
]


@settings(max_examples=40)
@given(config=st.sampled_from(CONFIGS), steps=st.integers(2, 60), seed=st.integers(0, 99), doubled=st.booleans())
def test_a_whole_trajectory_is_the_same(config, steps, seed, doubled):
    dtype = torch.float64 if doubled else torch.float32
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(2, 3, 4, 4, generator=g, dtype=dtype)
    channels = 6 if config["variance_type"] == "learned_range" else 3
    weights = torch.randn(channels, 3, generator=g, dtype=dtype) / 2
    ends = []
    for kind in (theirs, UnCLIPScheduler):
        scheduler = kind(**config)

        def predict(x, t):
            return torch.einsum("oc,bchw->bohw", weights, x).tanh() + t / 1e4

        ends.append(denoise(predict, start, scheduler, steps, DenoisingOptions(generator=torch.Generator().manual_seed(1))))
    assert torch.equal(*ends)


def test_configuration_and_noising_are_the_same():
    ours, old = UnCLIPScheduler(), theirs()
    public = {k: v for k, v in old.config.items() if not k.startswith("_")}
    assert public == {k: v for k, v in ours.config.items() if not k.startswith("_")}
    assert torch.equal(ours.alphas_cumprod, old.alphas_cumprod) and torch.equal(ours.timesteps, old.timesteps)
    clean, noise, t = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0, 400, 999])
    torch.testing.assert_close(ours.add_noise(clean, noise, t), old.add_noise(clean, noise, t))
    assert isinstance(UnCLIPScheduler.from_config(old.config), UnCLIPScheduler)


@pytest.mark.parametrize("config", CONFIGS)
def test_one_step_ends_on_the_prediction(config):
    scheduler = UnCLIPScheduler(**config)
    clean = torch.rand(2, 3, 4, 4)

    def perfect(x, t):
        alpha = scheduler.alphas_cumprod[int(t)]
        answer = clean if config["prediction_type"] == "sample" else (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return torch.cat([answer, answer], 1) if config["variance_type"] == "learned_range" else answer

    drawn = denoise(perfect, torch.randn(2, 3, 4, 4), scheduler, 1)
    torch.testing.assert_close(drawn, clean, rtol=0, atol=2e-2)  # an alpha of 2e-5 amplifies rounding
    with pytest.raises(ZeroDivisionError):
        theirs(**config).set_timesteps(1)


def test_saved_equals_loaded(tmp_path):
    UnCLIPScheduler(variance_type="learned_range").save_pretrained(tmp_path)
    assert UnCLIPScheduler.from_pretrained(tmp_path).config.variance_type == "learned_range"
    assert diffusers.UnCLIPScheduler.from_pretrained(tmp_path).config.variance_type == "learned_range"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variance_type": "large"}, "fixed_small_log or learned_range, got 'large'"),
        ({"prediction_type": "v_prediction"}, "got 'v_prediction'"),
        ({"beta_schedule": "linear"}, "got 'linear'"),
    ],
)
def test_unknown_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnCLIPScheduler(**arguments)
    with pytest.raises(ValueError, match="got 0"):
        UnCLIPScheduler().set_timesteps(0)
    with pytest.raises(ValueError, match="predicts no variance"):
        UnCLIPScheduler(variance_type="learned_range").step(torch.zeros(1, 3, 2, 2), 5, torch.zeros(1, 3, 2, 2))
