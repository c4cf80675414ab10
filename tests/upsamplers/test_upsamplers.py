"""The upsamplers and the corruption that they are trained against."""

import numpy as np
import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

from upsamplers import Upsampler
from upsamplers.degrade import add_noise, bsr, corrupt, gaussian_blur, gaussian_kernel, jpeg, noise_labels


def test_a_new_upsampler_returns_the_resized_image():
    sample = torch.randn(2, 6, 32, 48)
    assert torch.equal(Upsampler(32, channels=[8, 16], blocks=[1, 1])(sample, 10).sample, sample[:, 3:])


def test_a_noise_conditioned_upsampler_uses_the_noise_level():
    settings = {"sample_size": 32, "channels": [8, 16], "blocks": [1, 1]}
    conditioned, plain = Upsampler(**settings, class_embed_type="timestep"), Upsampler(**settings)
    randomise(plain)
    conditioned.load_state_dict(
        plain.state_dict() | {k: v for k, v in conditioned.state_dict().items() if k.startswith("class_embedding")}
    )
    sample = torch.randn(2, 6, 32, 48)
    labels = noise_labels(torch.tensor([0.0, 0.2]))
    assert torch.equal(conditioned(sample, 10, labels).sample, plain(sample, 10).sample), (
        "at initialisation it ignores the noise level"
    )
    torch.nn.init.normal_(conditioned.class_embedding[-1].weight, std=0.1)
    one_by_one = [conditioned(sample[:1], 10, label[None]).sample for label in labels]
    assert (one_by_one[0] - one_by_one[1]).abs().max() > 1e-4
    torch.testing.assert_close(conditioned(sample[:1].repeat(2, 1, 1, 1), 10, labels).sample, torch.cat(one_by_one))
    with pytest.raises(ValueError, match="'timestep' needs class_labels"):
        conditioned(sample, 10)
    with pytest.raises(ValueError, match="None takes no class_labels"):
        plain(sample, 10, labels)
    with pytest.raises(ValueError, match="must be timestep or nothing, got 'identity'"):
        Upsampler(32, class_embed_type="identity")


def test_cropping_and_upsampling_commute():
    """Fully convolutional: far from the edges a crop gets what the full image got there."""
    network = randomise(Upsampler(64, unshuffle=2, channels=[8], blocks=[1])).double()
    sample = torch.randn(1, 6, 64, 64, dtype=torch.float64)
    full = network(sample, 5).sample[..., 24:40, 24:40]
    crop = network(sample[..., 8:56, 8:56], 5).sample[..., 16:32, 16:32]
    torch.testing.assert_close(crop, full)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"multiples of 8, got \[36, 32\]"):
        Upsampler(32, channels=[8, 8], blocks=[1, 1])(torch.randn(1, 6, 36, 32), 0)
    with pytest.raises(ValueError, match=r"in_channels \(3\) must be twice out_channels \(3\)"):
        Upsampler(32, in_channels=3)


@settings(max_examples=20)
@given(sigma=st.floats(0.0, 2.0), value=st.floats(-1, 1))
def test_blur_keeps_flat_images_and_never_leaves_the_range(sigma, value):
    flat = torch.full((1, 3, 8, 8), value)
    torch.testing.assert_close(gaussian_blur(flat, torch.tensor([sigma])), flat)
    noisy = torch.rand(1, 3, 8, 8) * 2 - 1
    assert gaussian_blur(noisy, torch.tensor([sigma])).abs().max() <= noisy.abs().max() + 1e-6


def test_blur_differs_by_image():
    images = torch.rand(2, 3, 8, 8)
    blurred = gaussian_blur(images, torch.tensor([0.0, 0.6]))
    torch.testing.assert_close(blurred[0], images[0])
    assert blurred[1].std() < images[1].std()
    torch.testing.assert_close(blurred[1:], gaussian_blur(images[1:], torch.tensor([0.6])))


def test_corruption_of_nothing_is_nothing():
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(corrupt(images, torch.rand(2, 4), noise, 0.0, 0.0), images)
    assert add_noise(images, torch.tensor([5.0, 5.0]), noise).abs().max() <= 1


def photo(height: int = 64, width: int = 48) -> torch.Tensor:
    """[3, H, W] in [0, 1] with slow and fast changes."""
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    return torch.stack([(x.sin() + 1) / 2, (y.cos() + 1) / 2, ((x * y).sin() > 0).float()])


def test_bsr_is_its_seeds_alone_and_of_many_kinds():
    low = [bsr(photo(), np.random.default_rng([1, n])) for n in range(40)]
    again = [bsr(photo(), np.random.default_rng([1, n])) for n in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(low[:3], again, strict=True))
    assert all(p.shape == (3, 16, 12) and p.min() >= 0 and p.max() <= 1 for p in low)
    plain = torch.nn.functional.avg_pool2d(photo(), 4)
    errors = torch.stack([(p - plain).abs().mean() for p in low])
    assert errors.min() > 0.02 and errors.max() < 0.4 and errors.max() > 2 * errors.min()  # degraded, and still the image
    likeness = [np.corrcoef(p.flatten(), plain.flatten())[0, 1] for p in low]
    assert np.mean(likeness) > 0.6 and np.corrcoef(torch.stack(low).mean(0).flatten(), plain.flatten())[0, 1] > 0.8


def test_bsr_needs_sizes_that_are_multiples_of_the_scale():
    with pytest.raises(ValueError, match=r"multiples of 4, got \[62, 48\]"):
        bsr(photo(62), np.random.default_rng(0))


def test_kernels_sum_to_one_and_turn():
    wide = gaussian_kernel(9, (3.0, 0.7))
    assert wide.sum() == pytest.approx(1) and gaussian_kernel(7, (1.0, 1.0), 0.4).allclose(gaussian_kernel(7, (1.0, 1.0)))
    assert wide.sum(0).std() < wide.sum(1).std()
    torch.testing.assert_close(gaussian_kernel(9, (3.0, 0.7), np.pi / 2), wide.T, atol=1e-6, rtol=0)


def test_jpeg_of_lower_quality_is_farther_off():
    errors = [(jpeg(photo()[None], q) - photo()[None]).abs().mean() for q in (10, 50, 95)]
    assert errors[0] > errors[1] > errors[2] > 0
