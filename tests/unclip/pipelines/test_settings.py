"""Sampling settings: their validation, where they come from, and when guidance is on."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

import unclip.networks
import unclip.pipelines.base
from unclip import UnCLIPPipeline
from unclip.pipelines.settings import DEFAULTS, NO_DECODER, NO_PRIOR, SamplingSettings

NAMES = [field.name for field in fields(SamplingSettings)]
OLD = ("BATCH", "TILE_OVERLAP", "SLOW", "TextCondition", "copies", "fresh_generator", "stride", "check_fit", "check_settings")


@given(st.dictionaries(st.sampled_from(NAMES), st.none() | st.just(1)), st.dictionaries(st.sampled_from(NAMES), st.just(3)))
def test_an_argument_goes_before_the_checkpoints_default_and_that_before_the_packages(arguments, defaults):
    for values in (arguments, defaults):
        for name in ("decoder_guidance_interval", "upsampler_noise_level"):  # 1 and 3 are no valid values of theirs
            values.pop(name, None)
    settings = SamplingSettings.resolve(defaults, arguments | {"prompt": "a star"})
    for name in NAMES:
        wanted = arguments.get(name) or defaults.get(name) or DEFAULTS[name]
        assert getattr(settings, name) == wanted


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("prior_num_inference_steps", 0, "a whole number of at least 1, got 0"),
        ("prior_candidates", 1.5, "a whole number of at least 1, got 1.5"),
        ("decoder_guidance_scale", float("inf"), "a number of at least 0, got inf"),
        ("prior_guidance_scale", float("nan"), "a number of at least 0, got nan"),
        ("decoder_guidance_interval", [0.5, 0.5], r"\(low, high\) with 0 <= low < high <= 1, got \[0.5, 0.5\]"),
        ("decoder_timestep_shift", 0, "from 0.01 to 100, got 0"),
        ("upsampler_noise_level", "1", "from 0 to 1, got '1'"),
    ],
)
def test_a_setting_out_of_range_is_named_as_argument_and_as_default(tiny_folder, name, value, wanted):
    with pytest.raises(ValueError, match=f"^{name} must be {wanted}$"):
        SamplingSettings(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be {wanted}$"):
        UnCLIPPipeline.from_pretrained(tiny_folder, defaults={name: value})


@given(st.floats(0, 20), st.floats(0, 20))
def test_guidance_is_off_everywhere_where_no_scale_exceeds_1(prior, decoder):
    both = SamplingSettings(prior_guidance_scale=prior, decoder_guidance_scale=decoder)
    for stage, scale in (("prior", prior), ("decoder", decoder)):
        assert both.guidance_scale(stage) == (scale if max(prior, decoder) > 1 else 1.0)
    alone = (
        SamplingSettings(**NO_PRIOR, decoder_guidance_scale=decoder),
        SamplingSettings(**NO_DECODER, prior_guidance_scale=prior),
    )
    assert alone[0].guidance_scale("decoder") == max(decoder, 1.0)
    assert alone[1].guidance_scale("prior") == max(prior, 1.0)


@pytest.mark.parametrize("name", OLD)
def test_names_of_version_0_1_are_found_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match=f"has moved to unclip.pipelines.*{name}"):
        assert getattr(unclip.pipelines.base, name) is not None


@pytest.mark.parametrize(("old", "new"), [("draws_itself", "is_autoregressive"), ("pictures_at_once", "images_at_once")])
def test_renamed_names_of_version_0_1_are_found_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to .*{new};"):
        assert getattr(unclip.pipelines.base, old).__name__ == new
    with pytest.warns(DeprecationWarning, match="is_noise_conditioned;"):
        assert unclip.networks.told_of_noise.__name__ == "is_noise_conditioned"
    for module in (unclip.networks, unclip.pipelines.base):
        with pytest.raises(AttributeError, match="has no attribute 'never'"):
            module.never  # noqa: B018
