"""Renders images of layered icons: from SVG by resvg (exact), or by blending cached sprites (fast).

An image is a list of `Layer`s over a background colour. Both renderers apply the same operations, so that a 64 px training
image blended from sprites shows what the SVG of the same layers shows.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

WHITE = (255, 255, 255)

# Target hue in degrees and luma of a recoloured sprite's dominant colour, for each colour word.
COLOURS: dict[str, tuple[float, float]] = {
    "red": (0.0, 0.40),
    "orange": (28.0, 0.60),
    "yellow": (50.0, 0.80),
    "green": (120.0, 0.50),
    "blue": (217.0, 0.42),
    "purple": (275.0, 0.38),
    "pink": (330.0, 0.65),
}
# The same words, and others, as backgrounds, in sRGB.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (245, 146, 45),
    "yellow": (250, 212, 60),
    "green": (72, 176, 90),
    "blue": (66, 133, 222),
    "purple": (136, 84, 190),
    "pink": (247, 158, 194),
    "black": (24, 24, 27),
    "gray": (150, 153, 158),
}
# Backgrounds named by a place or a time.
GROUNDS: dict[str, tuple[int, int, int]] = {
    "grass": (122, 184, 82),
    "night": (22, 27, 60),
    "sea": (44, 130, 196),
    "snow": (222, 235, 246),
    "sand": (232, 202, 142),
    "space": (14, 12, 32),
    "sky": (150, 205, 245),
    "forest": (42, 94, 58),
    "sunset": (246, 150, 92),
}
LUMA = np.array([0.213, 0.715, 0.072], dtype=np.float32)


@dataclass(frozen=True)
class Layer:
    """One icon in an image: `icon` is a row number; centre `x`, `y` and `size` are fractions of the image's side.

    `matrix` is a 3x3 colour matrix on sRGB values in [0, 1], row-major, or None to keep the colours.
    """

    icon: int
    x: float
    y: float
    size: float
    matrix: tuple[float, ...] | None = None


# ---------------------------------------------------------------------------------------------- colours


def hue_rotation(degrees: float, scale: float = 1.0) -> tuple[float, ...]:
    """Colour matrix that rotates the hue and multiplies luma by `scale` (Filter Effects, section 9.8, `hueRotate`)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    r, g, b = (float(v) for v in LUMA)
    matrix = np.array(
        [
            [r + c * (1 - r) - s * r, g - c * g - s * g, b - c * b + s * (1 - b)],
            [r - c * r + s * 0.143, g + c * (1 - g) + s * 0.140, b - c * b - s * 0.283],
            [r - c * r - s * (1 - r), g - c * g + s * g, b + c * (1 - b) + s * b],
        ]
    )
    return tuple(float(v) for v in (matrix * scale).ravel())


def apply_matrix(rgb: np.ndarray, matrix: Sequence[float]) -> np.ndarray:
    """`rgb` [..., 3] in [0, 1] through a 3x3 colour matrix, clamped to [0, 1]."""
    return np.clip(rgb @ np.asarray(matrix, dtype=np.float32).reshape(3, 3).T, 0.0, 1.0)


def hue_saturation_value(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees [0, 360), HSV saturation and value in [0, 1] of `rgb` [..., 3] in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, 1.0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 60
    return np.where(chroma > 0, hue, 0.0), np.where(high > 0, chroma / np.maximum(high, 1e-6), 0.0), high


def named_colours(rgb: np.ndarray) -> np.ndarray:
    """The colour word of each pixel of `rgb` [..., 3] in [0, 1]: an array of str, "" where none of them fits."""
    hue, saturation, value = hue_saturation_value(rgb)
    luma = rgb @ LUMA
    vivid = (saturation > 0.3) & (value > 0.25)
    names = np.full(hue.shape, "", dtype="<U6")
    warm = (hue < 16) | (hue >= 342)
    names[vivid & warm & (luma < 0.55)] = "red"
    names[vivid & (((hue >= 300) & (hue < 342)) | (warm & (luma >= 0.55)))] = "pink"
    names[vivid & (hue >= 16) & (hue < 42) & (luma > 0.42)] = "orange"
    names[vivid & (hue >= 42) & (hue < 68) & (luma > 0.5)] = "yellow"
    names[vivid & (hue >= 75) & (hue < 170)] = "green"
    names[vivid & (hue >= 190) & (hue < 250)] = "blue"
    names[vivid & (hue >= 255) & (hue < 300)] = "purple"
    return names


def dominant_colours(sprite: np.ndarray, min_share: float = 0.18) -> tuple[str, ...]:
    """The colour words that at least a share `min_share` of a sprite's opaque pixels have, the largest first.

    `sprite` is [H, W, 4] uint8, RGBA. Beside the words of `COLOURS`: brown, black, gray and white.
    """
    rgb = sprite[sprite[..., 3] > 127][:, :3].astype(np.float32) / 255
    if not len(rgb):
        return ()
    names = named_colours(rgb)
    hue, saturation, value = hue_saturation_value(rgb)
    luma, left = rgb @ LUMA, names == ""
    pale = left & (saturation < 0.2)
    names[left & (value <= 0.25)] = "black"
    names[pale & (value > 0.25) & (luma < 0.85)] = "gray"
    names[pale & (luma >= 0.85)] = "white"
    names[(saturation > 0.3) & (value > 0.25) & (hue >= 8) & (hue < 45) & (luma < 0.48)] = "brown"
    words, counts = np.unique(names, return_counts=True)
    found = sorted((-count, word) for word, count in zip(words.tolist(), counts.tolist(), strict=True) if word)
    return tuple(word for count, word in found if -count >= min_share * len(rgb))


def count_parts(sprite: np.ndarray) -> int:
    """The number of separate parts of similar size, 2 to 5, in a sprite [H, W, 4] uint8; 1 for any other drawing."""
    left = (sprite[..., 3] > 127).copy()
    sizes: list[int] = []
    while left.any() and len(sizes) < 8:
        grown = np.zeros_like(left)
        grown[tuple(np.argwhere(left)[0])] = True
        while True:  # flood fill
            wide = grown.copy()
            wide[1:] |= grown[:-1]
            wide[:-1] |= grown[1:]
            wide[:, 1:] |= wide[:, :-1].copy()
            wide[:, :-1] |= wide[:, 1:].copy()
            wide &= left
            if (wide == grown).all():
                break
            grown = wide
        sizes.append(int(grown.sum()))
        left &= ~grown
    large = [size for size in sizes if size > 0.25 * max(sizes)]
    alike = len(large) == len(sizes) and 2 <= len(sizes) <= 5 and min(sizes) > 0.6 * max(sizes)
    return len(sizes) if alike else 1


def colour_share(sprite: np.ndarray, colour: str, matrix: Sequence[float] | None = None) -> float:
    """Share of a sprite's opaque, coloured pixels that are named `colour`; `sprite` [H, W, 4] uint8, RGBA."""
    rgb = sprite[sprite[..., 3] > 127][:, :3].astype(np.float32) / 255
    if matrix is not None and len(rgb):
        rgb = apply_matrix(rgb, matrix)
    _, saturation, value = hue_saturation_value(rgb)
    coloured = rgb[(saturation > 0.2) & (value > 0.2)]
    if len(coloured) < 0.25 * len(rgb) or not len(rgb):
        return 0.0
    return float((named_colours(coloured) == colour).mean())


def recolouring_matrix(sprite: np.ndarray, colour: str, share: float = 0.6) -> tuple[float, ...] | None:
    """A colour matrix after which at least `share` of the sprite's coloured pixels are `colour`, else None.

    The dominant hue is the chroma-weighted circular mean; a sprite of many hues has none, and None is returned.
    """
    rgb = sprite[sprite[..., 3] > 127][:, :3].astype(np.float32) / 255
    if not len(rgb):
        return None
    hue, saturation, value = hue_saturation_value(rgb)
    weight = saturation * value
    if weight.mean() < 0.15:
        return None
    mean = (weight * np.exp(1j * np.radians(hue))).sum() / weight.sum()
    if abs(mean) < 0.75:
        return None
    target, luma = COLOURS[colour]
    now = float((rgb @ LUMA * weight).sum() / weight.sum())
    matrix = hue_rotation(target - float(np.degrees(np.angle(mean))), float(np.clip(luma / max(now, 1e-3), 0.5, 1.6)))
    return matrix if colour_share(sprite, colour, matrix) >= share else None


# ---------------------------------------------------------------------------------------------- exact: SVG


def compose_svg(layers: Sequence[Layer], markup: Callable[[int], str], background: tuple[int, int, int] = WHITE) -> str:
    """One self-contained square SVG (viewBox 0 0 1 1) of the layers; `markup(icon)` is an icon's own SVG."""
    filters, body = [], []
    for n, layer in enumerate(layers):
        turned = ""
        if layer.matrix is not None:
            m = layer.matrix
            rows = " ".join(f"{m[3 * i]:.5f} {m[3 * i + 1]:.5f} {m[3 * i + 2]:.5f} 0 0" for i in range(3))
            filters.append(
                f'<filter id="turn{n}" color-interpolation-filters="sRGB" x="0" y="0" width="1" height="1">'
                f'<feColorMatrix type="matrix" values="{rows} 0 0 0 1 0"/></filter>'
            )
            turned = f' filter="url(#turn{n})"'
        left, top, side = layer.x - layer.size / 2, layer.y - layer.size / 2, layer.size
        nested = markup(layer.icon).replace(
            "<svg ", f'<svg x="{left:.5f}" y="{top:.5f}" width="{side:.5f}" height="{side:.5f}" ', 1
        )
        body.append(f"<g{turned}>{nested}</g>")
    ground = "#{:02x}{:02x}{:02x}".format(*background)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">'
        f'<defs>{"".join(filters)}</defs><rect width="1" height="1" fill="{ground}"/>{"".join(body)}</svg>'
    )


def render_svg(svg: str, size: int, window: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> np.ndarray:
    """RGBA pixels [size, size, 4] uint8 of a square SVG; `window` (left, top, side) in [0, 1] picks a crop.

    The SVG must be trusted: resvg follows local file references.
    """
    import resvg_py

    left, top, side = window
    inner = svg.replace("<svg ", '<svg x="0" y="0" width="1" height="1" ', 1)
    outer = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" '
        f'viewBox="{left} {top} {side} {side}">{inner}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=outer, skip_system_fonts=True))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def flatten(rgba: np.ndarray, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """RGBA [H, W, 4] uint8 over an opaque colour: RGB [H, W, 3] uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + np.array(background, dtype=np.float32) * (1 - alpha)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- fast: sprites


def compose_sprites(
    layers: Sequence[Layer], sprites: np.ndarray, size: int, background: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """RGB [size, size, 3] uint8: the layers blended from cached `sprites` [N, S, S, 4] uint8, RGBA."""
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = np.array(background, dtype=np.float32) / 255
    for layer in layers:
        sprite = np.asarray(sprites[layer.icon]).astype(np.float32) / 255
        if layer.matrix is not None:
            sprite = np.concatenate([apply_matrix(sprite[..., :3], layer.matrix), sprite[..., 3:]], -1)
        side = layer.size * size
        left, top = layer.x * size - side / 2, layer.y * size - side / 2
        x0, y0 = max(int(np.floor(left)), 0), max(int(np.floor(top)), 0)
        x1, y1 = min(int(np.ceil(left + side)), size), min(int(np.ceil(top + side)), size)
        sprite[..., :3] *= sprite[..., 3:]
        patch = _resample(sprite, (left, top, side), (x0, y0, x1, y1))
        region = canvas[y0:y1, x0:x1]
        region *= 1 - patch[..., 3:]
        region += patch[..., :3]
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


@torch.autocast("cpu", enabled=False)
def _resample(sprite: np.ndarray, square: tuple[float, float, float], box: tuple[int, int, int, int]) -> np.ndarray:
    """Area-resample a premultiplied sprite [S, S, 4], placed on `square` (left, top, side), at the pixels of `box`."""
    left, top, side = square
    x0, y0, x1, y1 = box
    rows = area_weights(sprite.shape[0], top, side, y0, y1)
    columns = area_weights(sprite.shape[1], left, side, x0, x1)
    # torch, because it runs on one thread in a data worker; numpy's BLAS would use every core
    source = torch.from_numpy(sprite)  # [S, S, 4]
    down = (torch.from_numpy(rows) @ source.flatten(1)).unflatten(1, source.shape[1:])  # [Y, S, 4]
    return (torch.from_numpy(columns) @ down).numpy()  # [Y, X, 4]


def area_weights(source: int, start: float, side: float, first: int, last: int) -> np.ndarray:
    """[last - first, source]: the overlap of each source cell with each output pixel, in pixels."""
    step = side / source
    cells = start + step * np.arange(source, dtype=np.float64)
    pixels = np.arange(first, last, dtype=np.float64)[:, None]
    overlap = np.minimum(pixels + 1, cells + step) - np.maximum(pixels, cells)
    return np.maximum(overlap, 0.0).astype(np.float32)
