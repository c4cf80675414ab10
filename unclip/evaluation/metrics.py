"""Numbers from scores, features and pixels, each with an interval. Own short code, tested against closed forms."""

# N pictures, M others, T texts, D feature dimension, H height, W width

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 1000
GROUPS = 20


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, from `n` pictures."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


# ---------------------------------------------------------------------------------------------- intervals


def mean(values: Tensor, seed: int = 0) -> Estimate:
    """The mean of `values` [N] with its percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3)."""
    values = values.double().numpy()
    means = values[_resampled(len(values), seed)].mean(1)
    return Estimate(float(values.mean()), *map(float, np.percentile(means, (2.5, 97.5))), len(values))


def ratio(values: Tensor, reference: Tensor, seed: int = 0) -> Estimate:
    """mean(values) / mean(reference), both [N] and of the same prompts, which are resampled together."""
    ours, theirs = values.double().numpy(), reference.double().numpy()
    rows = _resampled(len(ours), seed)
    below = np.maximum(theirs[rows].mean(1), 1e-12)
    low, high = np.percentile(ours[rows].mean(1) / below, (2.5, 97.5))
    return Estimate(float(ours.mean() / max(theirs.mean(), 1e-12)), float(low), float(high), len(ours))


def _resampled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def jackknife(statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, units: Tensor | None = None) -> Estimate:
    """`statistic` of two sets [N, D], [M, D], with 1.96 standard errors of the delete-a-group jackknife about it.

    A bootstrap repeats rows, which a distance between sets takes for a lack of diversity; leaving rows out does not. Rows of
    one of `units` [N], numbered from 0, are of one prompt, in both sets, and leave together: prompts are what was sampled.
    """
    of_x, of_y = (torch.arange(len(rows)) if units is None else units for rows in (x, y))
    value, groups = statistic(x, y), min(GROUPS, int(of_x.max()) + 1, int(of_y.max()) + 1)
    left = np.array([statistic(x[of_x % groups != g], y[of_y % groups != g]) for g in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error, len(x))


# ---------------------------------------------------------------------------------------------- sets of features


def frechet(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features [N, D], [M, D] (arXiv 1706.08500, equation 6)."""
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()  # tr of the root of a similar matrix
    distance = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return max(distance.item(), 0.0)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features [N, D], [M, D] under (x.y / D + 1)^3 (arXiv 1801.01401, section 4)."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def precision_recall(drawn: Tensor, real: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Which of `drawn` [N, D] lie in the manifold of `real` [M, D], and the other way; bool [N], [M].

    A manifold is the union of balls about its points that reach their k-th neighbour (arXiv 1904.06991, section 2).
    """

    def covered(points: Tensor, by: Tensor) -> Tensor:
        reach = torch.cdist(by, by).topk(min(neighbours + 1, len(by)), largest=False).values[:, -1]
        return (torch.cdist(points, by) <= reach).any(1)

    return covered(drawn.double(), real.double()), covered(real.double(), drawn.double())


# ---------------------------------------------------------------------------------------------- ranks


def recalled(scores: Tensor, right: Tensor, k: int) -> Tensor:
    """Whether one of the k highest of `scores` [N, T] is `right` (bool [N, T]); float [N]."""
    best = scores.topk(min(k, scores.shape[1]), 1).indices
    return right.gather(1, best).any(1).float()


# ---------------------------------------------------------------------------------------------- pictures


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture; [N, 3, H, W] in [0, 1] -> [N]."""
    return -10 * (pictures - truth).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def ssim(pictures: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each picture, Gaussian window of 11 pixels and sigma 1.5 (Wang et al. 2004, equation 13).

    [N, 3, H, W] in [0, 1] -> [N].
    """
    taps = torch.exp(-0.5 * ((torch.arange(11, dtype=pictures.dtype) - 5) / 1.5) ** 2)
    taps = taps / taps.sum()

    def blurred(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[None]  # [1, 3N, H, W]: as channels, each its own, more than twice as fast as one by one
        for window in (taps.view(1, 1, -1, 1), taps.view(1, 1, 1, -1)):
            flat = F.conv2d(flat, window.expand(flat.shape[1], -1, -1, -1), groups=flat.shape[1])
        return flat[0].unflatten(0, x.shape[:2])

    mean_x, mean_y = blurred(pictures), blurred(truth)
    var_x, var_y = blurred(pictures**2) - mean_x**2, blurred(truth**2) - mean_y**2
    cov = blurred(pictures * truth) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return index.mean((1, 2, 3))


def sharpness(pictures: Tensor, share: float = 0.05) -> Tensor:
    """Mean step from pixel to pixel over the steepest `share` of each picture; [N, 3, H, W] in [0, 1] -> [N]."""
    grey = pictures.mean(1)
    across, down = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    steps = (across**2 + down**2).sqrt().flatten(1)
    return steps.topk(max(int(share * steps.shape[1]), 1), 1).values.mean(1)
