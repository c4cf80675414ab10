"""Image distortions that no network of this package is trained with; they test the robustness of a judge."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image


def distort(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """`image` [S, S, 3] uint8 with one of `DISTORTIONS`, its strength drawn from `rng`."""
    if kind not in DISTORTIONS:
        raise ValueError(f"unknown distortion {kind!r}; choose from {', '.join(DISTORTIONS)}")
    return DISTORTIONS[kind](image, rng)


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(30, 70)))
    return np.asarray(Image.open(file).convert("RGB"))


def _gamma(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    power = np.exp(rng.uniform(-0.4, 0.4))
    return ((image / 255.0) ** power * 255).round().astype(np.uint8)


def _noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grain = rng.normal(0, rng.uniform(5, 15), image.shape)
    return (image + grain).round().clip(0, 255).astype(np.uint8)


def _low_resolution(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[0]
    small = int(side * rng.uniform(0.6, 0.85))
    shrunk = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
    return np.asarray(shrunk.resize((side, side), Image.Resampling.NEAREST))


def _shear(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side, by = image.shape[0], rng.uniform(0.08, 0.18) * rng.choice([-1, 1])
    corner = tuple(int(v) for v in image[0, 0])
    matrix = (1, by, -by * side / 2, 0, 1, 0)
    sheared = Image.fromarray(image).transform(
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
