"""Operations on CLIP embeddings and noise: spherical interpolation, means on the sphere, principal axes."""

# N vectors, D dimensions

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..io.checkpoints import check_safetensors, save_tensors

EPSILON = 1e-7


def slerp(start: Tensor, end: Tensor, share: float | Tensor) -> Tensor:
    """The point at `share` of the great circle from `start` to `end` [..., D] (paper, section 3.2).

    Exactly `start` at 0 and `end` at 1; the length is interpolated linearly.
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


@dataclass
class PrincipalAxes:
    """The mean [D] and the principal axes [K, D], orthonormal, the longest first, of CLIP embeddings (paper, figure 7)."""

    mean: Tensor
    axes: Tensor
    clip_fingerprint: str | None = None

    @classmethod
    def of(cls, vectors: Tensor, clip_fingerprint: str | None = None) -> "PrincipalAxes":
        """The axes of `vectors` [N, D], N of at least 2: as many as there are dimensions that they span."""
        if vectors.ndim != 2 or len(vectors) < 2:
            raise ValueError(f"principal axes need two vectors or more, got {list(vectors.shape)}")
        mean = vectors.mean(0)
        _, lengths, axes = torch.linalg.svd(vectors - mean, full_matrices=False)
        spanned = lengths > lengths.max() * max(vectors.shape) * torch.finfo(vectors.dtype).eps
        return cls(mean, axes[spanned], clip_fingerprint)

    def first(self, vectors: Tensor, count: int) -> Tensor:
        """`vectors` [..., D] projected onto the mean and the first `count` axes. Raises ValueError for a count out of range."""
        if not 0 <= count <= len(self.axes):
            raise ValueError(f"there are 0 to {len(self.axes)} principal components to keep, got {count}")
        axes = self.axes[:count].to(vectors)
        mean = self.mean.to(vectors)
        return mean + (vectors - mean) @ axes.T @ axes

    def save(self, path: Path) -> None:
        """Write them in half precision."""
        tensors = {n: getattr(self, n).half().contiguous() for n in ("mean", "axes")}
        save_tensors(tensors, path, {"clip_fingerprint": self.clip_fingerprint or ""})

    @classmethod
    def load(cls, path: Path) -> "PrincipalAxes":
        """Raises ValueError, naming the file, for one that is damaged or holds something else."""
        if set(check_safetensors(path)) != {"mean", "axes"}:
            raise ValueError(f"{path} holds no principal axes")
        with safe_open(path, "pt") as file:
            mean, axes = (file.get_tensor(n).float() for n in ("mean", "axes"))
            return cls(mean, axes, (file.metadata() or {}).get("clip_fingerprint") or None)
