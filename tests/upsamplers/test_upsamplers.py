"""The upsamplers and the corruption that they are trained against."""

import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

from upsamplers import Upsampler
from upsamplers.degrade import add_noise, corrupt, gaussian_blur


def test_a_new_upsampler_answers_with_the_resized_picture():
    sample = torch.randn(2, 6, 32, 48)
    assert torch.equal(Upsampler(32, channels=[8, 16], blocks=[1, 1])(sample, 10).sample, sample[:, 3:])


def test_a_crop_of_a_picture_is_a_picture_of_a_crop():
    """Fully convolutional: far from the edges a crop gets what the whole picture got there."""
    network = randomise(Upsampler(64, unshuffle=2, channels=[8], blocks=[1])).double()
    sample = torch.randn(1, 6, 64, 64, dtype=torch.float64)
    whole = network(sample, 5).sample[..., 24:40, 24:40]
    crop = network(sample[..., 8:56, 8:56], 5).sample[..., 16:32, 16:32]
    torch.testing.assert_close(crop, whole)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"multiples of 8, got \[36, 32\]"):
        Upsampler(32, channels=[8, 8], blocks=[1, 1])(torch.randn(1, 6, 36, 32), 0)
    with pytest.raises(ValueError, match=r"in_channels \(3\) must be twice out_channels \(3\)"):
        Upsampler(32, in_channels=3)


@settings(deadline=None, max_examples=20)
@given(sigma=st.floats(0.0, 2.0), value=st.floats(-1, 1))
def test_blur_keeps_flat_pictures_and_never_leaves_the_range(sigma, value):
    flat = torch.full((1, 3, 8, 8), value)
    torch.testing.assert_close(gaussian_blur(flat, torch.tensor([sigma])), flat)
    noisy = torch.rand(1, 3, 8, 8) * 2 - 1
    assert gaussian_blur(noisy, torch.tensor([sigma])).abs().max() <= noisy.abs().max() + 1e-6


def test_blur_is_each_pictures_own():
    pictures = torch.rand(2, 3, 8, 8)
    blurred = gaussian_blur(pictures, torch.tensor([0.0, 0.6]))
    torch.testing.assert_close(blurred[0], pictures[0])
    assert blurred[1].std() < pictures[1].std()
    torch.testing.assert_close(blurred[1:], gaussian_blur(pictures[1:], torch.tensor([0.6])))


def test_corruption_of_nothing_is_nothing():
    pictures, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(corrupt(pictures, torch.rand(2, 4), noise, 0.0, 0.0), pictures)
    assert add_noise(pictures, torch.tensor([5.0, 5.0]), noise).abs().max() <= 1
