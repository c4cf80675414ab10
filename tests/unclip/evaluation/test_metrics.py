"""Metrics against closed forms, intervals against their promise."""

import math

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from unclip.evaluation.metrics import (
    Estimate,
    frechet,
    jackknife,
    kernel_distance,
    mean,
    precision_recall,
    psnr,
    ratio,
    recall_at,
    sharpness,
    ssim,
)


def standard(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Rows whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_known_gaussians():
    x, y = standard(400, 6), standard(300, 6, seed=1)
    assert frechet(x, y) == pytest.approx(0, abs=1e-8)
    assert frechet(x, 2 * y + 3) == pytest.approx(6 * 9 + 6 * (1 + 4 - 2 * 2))
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turn = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = mix @ mix.T, turn @ turn.T  # covariances that do not commute
    root = torch.linalg.eigvals(a @ b).sqrt().sum().real
    assert frechet(x @ mix.T, y @ turn.T) == pytest.approx((a.trace() + b.trace() - 2 * root).item(), rel=1e-6)


def test_frechet_distance_of_fewer_rows_than_dimensions_is_finite():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert frechet(x, x) == pytest.approx(0, abs=1e-4) and math.isfinite(frechet(x, x + 1))


def test_kernel_distance_of_points_is_the_kernels_own():
    a, b = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 1.0])

    def k(u, v):
        return ((u @ v).item() / 3 + 1) ** 3

    assert kernel_distance(a.expand(5, 3), b.expand(7, 3)) == pytest.approx(k(a, a) + k(b, b) - 2 * k(a, b))
    assert kernel_distance(a.expand(5, 3), a.expand(7, 3)) == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased():
    g = torch.Generator().manual_seed(0)
    found = torch.tensor([kernel_distance(*torch.randn(2, 20, 4, generator=g)) for _ in range(300)])
    assert found.mean().abs() < 3 * found.std() / 300**0.5 and found.min() < 0


class Features(torch.nn.Module):
    """Features that are given in place of images."""

    num_features = 6

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features [80, 6] of one mean and [50, 6] of another."""
    g = torch.Generator().manual_seed(0)
    mix, turn = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    x, y = torch.randn(80, 6, generator=g, dtype=torch.float64), torch.randn(50, 6, generator=g, dtype=torch.float64)
    return x @ mix, y @ turn + 0.5


def test_frechet_distance_is_that_of_torchmetrics(features):
    theirs = FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    for batch, real in ((features[0][:30], True), (features[0][30:], True), (features[1], False)):
        theirs.update(batch, real=real)
    expected = theirs.compute().item()
    assert expected > 1 and frechet(*features) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_that_of_torchmetrics(features):
    """Which takes sets of one size and, with that size for its subsets, all of both."""
    x, y = features[0][:50], features[1]
    theirs = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=50).set_dtype(torch.float64)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    expected = theirs.compute()[0].item()
    assert expected > 0.1 and kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_see_lost_variety_and_strays():
    g = torch.Generator().manual_seed(0)
    left, right = torch.rand(60, 4, generator=g), torch.rand(60, 4, generator=g) + 50
    real = torch.cat([left, right])
    precision, recall = precision_recall(real, real)
    assert precision.all() and recall.all()
    precision, recall = precision_recall(left + 1e-3, real)
    assert precision.float().mean() > 0.95 and recall.float().mean() == pytest.approx(0.5, abs=0.03)
    precision, recall = precision_recall(left - 100, real)
    assert not precision.any() and not recall.any()


def test_recalled():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    right = torch.tensor([[False, False, True], [True, True, False]])
    assert recall_at(scores, right, 1).tolist() == [0, 1]
    assert recall_at(scores, right, 2).tolist() == [1, 1]
    assert recall_at(scores, ~right & False, 9).tolist() == [0, 0]


def test_intervals_hold_the_truth_as_often_as_they_say():
    g = torch.Generator().manual_seed(0)
    held = 0
    for trial in range(200):
        found = mean((torch.rand(80, generator=g) < 0.7).float(), seed=trial)
        held += found.low <= 0.7 <= found.high
    assert 0.9 <= held / 200 <= 0.985


def test_the_jackknife_finds_a_known_standard_error():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 1, generator=g), 2 * torch.randn(3000, 1, generator=g)
    found = jackknife(lambda a, b: (a.mean() - b.mean()).item(), x, y)
    error = (1 / 2000 + 4 / 3000) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.4)
    assert found.low < 0 < found.high and found.n == 2000


def test_the_jackknife_takes_rows_of_one_unit_for_one():
    def statistic(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.square().mean() - b[:, 0].mean()).item()

    x, units = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)), torch.arange(400)
    once, thrice = jackknife(statistic, x, x), jackknife(statistic, x.repeat(3, 1), x.repeat(3, 1), units.repeat(3))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=1e-5) and thrice.n == 1200


def test_a_ratio_resamples_both_sides_together():
    values = (torch.arange(50) % 3 == 0).float()
    assert ratio(values, values) == Estimate(1.0, 1.0, 1.0, 50)
    assert ratio(values / 2, values).value == pytest.approx(0.5)
    assert ratio(values, torch.zeros(50)).value > 1e6  # nothing to compare with: plainly not a share


def test_images():
    black, white = torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
    assert psnr(black, black + 0.1).tolist() == pytest.approx([20, 20], abs=1e-4)
    g = torch.Generator().manual_seed(0)
    noisy = torch.rand(2, 3, 32, 32, generator=g)
    assert ssim(noisy, noisy).tolist() == pytest.approx([1, 1])
    c1 = 0.01**2
    a, b = 0.2, 0.7  # of constant images only the luminance term is left
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(white * a, white * b).tolist() == pytest.approx([expected] * 2, abs=1e-3)
    step = black.clone()
    step[..., 16:] = 1
    assert sharpness(step, share=0.03).tolist() == pytest.approx([1, 1])
    assert sharpness(white).tolist() == [0, 0]
