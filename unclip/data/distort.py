"""Damage that no image-text model of ours is trained with: how far a judge's word holds is measured under it."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image


def distort(picture: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """`picture` [S, S, 3] uint8 with one of `DISTORTIONS`, its strength drawn from `rng`."""
    if kind not in DISTORTIONS:
        raise ValueError(f"unknown distortion {kind!r}; choose from {', '.join(DISTORTIONS)}")
    return DISTORTIONS[kind](picture, rng)


def _jpeg(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=int(rng.integers(30, 70)))
    return np.asarray(Image.open(file).convert("RGB"))


def _gamma(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    power = np.exp(rng.uniform(-0.4, 0.4))
    return ((picture / 255.0) ** power * 255).round().astype(np.uint8)


def _noise(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grain = rng.normal(0, rng.uniform(5, 15), picture.shape)
    return (picture + grain).round().clip(0, 255).astype(np.uint8)


def _low_resolution(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = picture.shape[0]
    small = int(side * rng.uniform(0.6, 0.85))
    shrunk = Image.fromarray(picture).resize((small, small), Image.Resampling.BOX)
    return np.asarray(shrunk.resize((side, side), Image.Resampling.NEAREST))


def _shear(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side, by = picture.shape[0], rng.uniform(0.08, 0.18) * rng.choice([-1, 1])
    corner = tuple(int(v) for v in picture[0, 0])
    matrix = (1, by, -by * side / 2, 0, 1, 0)
    sheared = Image.fromarray(picture).transform(
        (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner
    )
    return np.asarray(sheared)


DISTORTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "jpeg": _jpeg,
    "gamma": _gamma,
    "noise": _noise,
    "low resolution": _low_resolution,
    "shear": _shear,
}
