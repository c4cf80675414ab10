"""Great circles and means on the sphere, by what must hold for any vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.diffusion.latents import PrincipalAxes, slerp, spherical_mean

shares = st.floats(0, 1)
dims = st.integers(2, 64)


def vectors(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1).acos()


@settings(max_examples=100)
@given(dim=dims, share=shares, seed=st.integers(0, 999), scale=st.floats(0.01, 100))
def test_slerp_keeps_the_length_and_divides_the_angle(dim, share, seed, scale):
    a, b = torch.nn.functional.normalize(vectors(2, dim, seed), dim=-1) * scale
    if torch.pi - angle(a, b) < 1e-2:
        return
    between = slerp(a, b, share)
    torch.testing.assert_close(between.norm(), a.norm(), rtol=1e-9, atol=0)
    torch.testing.assert_close(angle(a, between), share * angle(a, b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slerp(b, a, 1 - share), between, rtol=1e-6, atol=1e-9 * scale)


@settings(max_examples=50)
@given(dim=dims, seed=st.integers(0, 999), nearness=st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 1.0]))
def test_slerp_is_exact_at_both_ends(dim, seed, nearness):
    a, other = vectors(2, dim, seed)
    b = a + nearness * other
    if torch.pi - angle(a, b) < 1e-2:
        return
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    path = slerp(a.expand(5, -1), b.expand(5, -1), torch.linspace(0, 1, 5, dtype=torch.float64))
    assert path.isfinite().all() and torch.equal(path[0], a) and torch.equal(path[-1], b)


def test_slerp_of_what_has_no_circle():
    with pytest.raises(ValueError, match="opposite"):
        slerp(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]), 0.5)
    with pytest.raises(ValueError, match="length 0"):
        slerp(torch.zeros(3), torch.ones(3), 0.5)


@settings(max_examples=60)
@given(dim=dims, share=shares, seed=st.integers(0, 999))
def test_the_mean_of_two_is_slerp(dim, share, seed):
    pair = torch.nn.functional.normalize(vectors(2, dim, seed), dim=-1)
    if angle(*pair) > 3.0:
        return
    mean = spherical_mean(pair, [1 - share, share])
    torch.testing.assert_close(mean, slerp(*pair, share), rtol=0, atol=1e-6)


@settings(max_examples=40)
@given(dim=st.integers(3, 32), count=st.integers(1, 6), seed=st.integers(0, 999))
def test_no_direction_nearby_is_nearer_than_the_mean(dim, count, seed):
    points = torch.nn.functional.normalize(vectors(1, dim, seed) + 0.5 * vectors(count, dim, seed + 1), dim=-1)
    weights = vectors(1, count, seed + 2)[0].abs() + 0.01
    mean = spherical_mean(points, weights)
    torch.testing.assert_close(mean.norm(), torch.ones((), dtype=mean.dtype))

    def cost(v: torch.Tensor) -> torch.Tensor:
        return (weights * angle(points, v.expand_as(points)).square()).sum()

    for step in vectors(5, dim, seed + 3):
        assert cost(mean) <= cost(torch.nn.functional.normalize(mean + 0.01 * step, dim=-1)) + 1e-9
    order = torch.randperm(count)
    torch.testing.assert_close(spherical_mean(points[order], weights[order]), mean, rtol=0, atol=1e-8)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0], [float("nan"), 1.0]])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        spherical_mean(torch.eye(2), weights)


def test_principal_axes_rebuild_what_they_span(tmp_path):
    points = vectors(20, 3, 0) @ vectors(3, 16, 1) + vectors(1, 16, 2)
    axes = PrincipalAxes.of(points, "a-clip")
    assert len(axes.axes) == 3
    torch.testing.assert_close(axes.axes @ axes.axes.T, torch.eye(3, dtype=points.dtype))
    errors = [(points - axes.first(points, count)).norm() for count in range(4)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-9
    assert torch.equal(axes.first(points, 0), points.mean(0).expand_as(points))
    axes.save(tmp_path / "axes.safetensors")
    again = PrincipalAxes.load(tmp_path / "axes.safetensors")
    torch.testing.assert_close(again.first(points, 3), points, rtol=0, atol=2e-2)
    assert again.clip_fingerprint == "a-clip"
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"0 to 3 principal components to keep, got {wrong}"):
            axes.first(points, wrong)
    with pytest.raises(ValueError, match=r"two vectors or more, got \[1, 16\]"):
        PrincipalAxes.of(points[:1])
