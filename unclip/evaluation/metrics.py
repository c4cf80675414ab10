"""Metrics of scores, features and pixels, with intervals; tested against closed forms."""

# N images, M others, T texts, D feature dimension, H height, W width

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
    """A number with its 95% interval, from `n` images."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


# ---------------------------------------------------------------------------------------------- intervals


def mean(values: Tensor, seed: int = 0) -> Estimate:
    """The mean of `values` [N] with its percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3)."""
    numbers = values.double().numpy()
    low, high = np.percentile(numbers[_resampled(len(numbers), seed)].mean(1), (2.5, 97.5))
    return Estimate(float(numbers.mean()), float(low), float(high), len(numbers))


def median(values: Tensor, seed: int = 0) -> Estimate:
    """The median of `values` [N] with its percentile bootstrap interval."""
    numbers = values.double().numpy()
    low, high = np.percentile(np.median(numbers[_resampled(len(numbers), seed)], 1), (2.5, 97.5))
    return Estimate(float(np.median(numbers)), float(low), float(high), len(numbers))


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

    A bootstrap repeats rows, which a distance between sets sees as a lack of diversity; leaving rows out does not. Rows with
    the same number in `units` [N] (from 0) belong to one prompt, in both sets, and are left out together.
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


def recall_at(scores: Tensor, right: Tensor, k: int) -> Tensor:
    """Recall at k: whether one of the k highest of `scores` [N, T] is `right` (bool [N, T]); float [N]."""
    best = scores.topk(min(k, scores.shape[1]), 1).indices
    return right.gather(1, best).any(1).float()


# ---------------------------------------------------------------------------------------------- images


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image; [N, 3, H, W] in [0, 1] -> [N]."""
    return -10 * (images - truth).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image, Gaussian window of 11 pixels and sigma 1.5 (Wang et al. 2004, equation 13).

    [N, 3, H, W] in [0, 1] -> [N].
    """
    taps = torch.exp(-0.5 * ((torch.arange(11, dtype=images.dtype) - 5) / 1.5) ** 2)
    taps = taps / taps.sum()

    def blurred(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[None]  # [1, 3N, H, W]: as channels, each its own, more than twice as fast as one by one
        for window in (taps.view(1, 1, -1, 1), taps.view(1, 1, 1, -1)):
            flat = F.conv2d(flat, window.expand(flat.shape[1], -1, -1, -1), groups=flat.shape[1])
        return flat[0].unflatten(0, x.shape[:2])

    mean_x, mean_y = blurred(images), blurred(truth)
    var_x, var_y = blurred(images**2) - mean_x**2, blurred(truth**2) - mean_y**2
    cov = blurred(images * truth) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return index.mean((1, 2, 3))


def sharpness(images: Tensor, share: float = 0.05) -> Tensor:
    """Mean gradient magnitude over the steepest `share` of each image; [N, 3, H, W] in [0, 1] -> [N]."""
    grey = images.mean(1)
    across, down = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    steps = (across**2 + down**2).sqrt().flatten(1)
    return steps.topk(max(int(share * steps.shape[1]), 1), 1).values.mean(1)


# ---------------------------------------------------------------------------------------------- objects on white

WHITE = 0.97  # pixels whose darkest channel is below belong to the object
FLAT = 0.02  # gradient magnitude below which a pixel counts as flat
LEVELS = 15  # colours are rounded to multiples of 1/15 before they are counted
COVERED = 0.9


def object_mask(images: Tensor) -> Tensor:
    """The pixels of images [N, 3, H, W] in [0, 1] that are not the white background: bool [N, H, W]."""
    return images.amin(1) < WHITE


def gradient_magnitude(images: Tensor) -> Tensor:
    """Root of the squared forward differences, summed over both axes and all channels; 0 past the last pixel.

    [N, 3, H, W] -> [N, H, W].
    """
    across = F.pad(images[..., 1:] - images[..., :-1], (0, 1))
    down = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    return (across.square() + down.square()).sum(1).sqrt()


def flat_share(images: Tensor) -> Tensor:
    """Share of each object's pixels that are flat; [N, 3, H, W] in [0, 1] -> [N], 0 without an object."""
    inside = object_mask(images)
    flat = (gradient_magnitude(images) < FLAT) & inside
    return flat.flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1)


def colour_count(images: Tensor) -> Tensor:
    """Fewest colours, of 16 levels a channel, that cover 90% of each object; [N, 3, H, W] in [0, 1] -> float [N]."""
    levels = (images * LEVELS).round().long()
    codes = (levels[:, 0] * 16 + levels[:, 1]) * 16 + levels[:, 2]  # [N, H, W]
    found = []
    for code, inside in zip(codes, object_mask(images), strict=True):
        counts = code[inside].unique(return_counts=True)[1].sort(descending=True).values
        found.append(int((counts.cumsum(0) < COVERED * counts.sum()).sum()) + 1 if len(counts) else 0)
    return torch.tensor(found, dtype=torch.float32)
