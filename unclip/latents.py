"""Moving between CLIP embeddings and between noises: great circles, means on the sphere, principal axes."""

# N vectors, D dimensions

import torch
from torch import Tensor

EPSILON = 1e-7


def slerp(start: Tensor, end: Tensor, share: float | Tensor) -> Tensor:
    """The point at `share` of the great circle from `start` to `end` [..., D] (paper, section 3.2).

    Exactly `start` at 0 and `end` at 1; the length goes linearly from one's to the other's, so that equal lengths stay.
    `share` may be a tensor that broadcasts against [...]. Vectors that point the same way are interpolated linearly;
    opposite ones have no single circle between them: ValueError.
    """
    share = torch.as_tensor(share, dtype=start.dtype, device=start.device)[..., None]
    lengths = [v.norm(dim=-1, keepdim=True) for v in (start, end)]
    if any((length == 0).any() for length in lengths):
        raise ValueError("a vector of length 0 has no direction to interpolate")
    a, b = start / lengths[0], end / lengths[1]
    angle = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))  # exact near 0 and pi
    if (torch.pi - angle < 1e-4).any():
        raise ValueError("opposite vectors have no single great circle between them")
    near = angle < 1e-4
    sine = torch.where(near, torch.ones_like(angle), angle.sin())
    weights = [torch.where(near, w, (w * angle).sin() / sine) for w in (1 - share, share)]
    direction = weights[0] * a + weights[1] * b
    direction = direction / direction.norm(dim=-1, keepdim=True)
    between = direction * ((1 - share) * lengths[0] + share * lengths[1])
    return torch.where(share == 0, start, torch.where(share == 1, end, between))


def spherical_mean(vectors: Tensor, weights: Tensor, steps: int = 50) -> Tensor:
    """The unit vector [D] with the least weighted sum of squared angles to `vectors` [N, D] (their Karcher mean).

    For two vectors it is `slerp`'s point between them. Raises ValueError for weights [N] that are negative or sum to 0.
    """
    weights = torch.as_tensor(weights, dtype=vectors.dtype, device=vectors.device)
    if weights.shape != vectors.shape[:1] or not weights.isfinite().all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"weights must be {len(vectors)} numbers of at least 0 that do not sum to 0, got {weights.tolist()}")
    weights = (weights / weights.sum())[:, None]
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    mean = (weights * units).sum(0)
    if mean.norm() < EPSILON:
        raise ValueError("these vectors cancel out: they have no mean direction")
    mean = mean / mean.norm()
    for _ in range(steps):
        cosine = (units @ mean).clamp(-1, 1)[:, None]
        angle = cosine.acos()
        across = units - cosine * mean
        length = across.norm(dim=-1, keepdim=True)
        tangent = (
            weights * torch.where(length > EPSILON, angle / length.clamp_min(EPSILON), torch.ones_like(angle)) * across
        ).sum(0)
        size = tangent.norm()
        if size < 1e-12:
            break
        mean = size.cos() * mean + size.sin() * tangent / size
        mean = mean / mean.norm()
    return mean


def principal_axes(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and the first `count` principal axes [count, D] of `vectors` [N, D] (paper, section 3.3, figure 7)."""
    if not 1 <= count <= min(vectors.shape):
        raise ValueError(f"count must be from 1 to {min(vectors.shape)}, got {count}")
    mean = vectors.mean(0)
    _, _, axes = torch.linalg.svd(vectors - mean, full_matrices=False)
    return mean, axes[:count]
