"""Composes batches of scenes from sprites, on any device; `render.compose_sprites` composes one scene on a CPU."""

# B scenes, L layers of each, K layers at once, S side of a sprite, Y rows and X columns of an image

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..io.pixels import float_to_uint8, uint8_to_float
from .render import Layer

_CHUNK = 32  # layers at once on a CPU: 64 KB each, so that they fit its cache


@dataclass
class Layers:
    """The layers of B scenes, back to front, padded to L.

    Attributes:
        icons: int64 [B, L], rows of the atlas; -1 where a scene has no more layers.
        x, y: float32 [B, L], the centre, in fractions of the image's side.
        size: float32 [B, L], the side, in fractions of the image's.
        matrices: float32 [B, L, 3, 3], colour matrices on sRGB values in [0, 1]; None where no layer has one.
    """

    icons: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    matrices: Tensor | None = None

    @classmethod
    def of(cls, scenes: Sequence[Sequence[Layer]]) -> "Layers":
        """The layers of some scenes, on the CPU."""
        longest = max(map(len, scenes))
        padding = Layer(-1, 0.5, 0.5, 1.0)
        padded = [[*layers, *[padding] * (longest - len(layers))] for layers in scenes]
        icons = torch.tensor([[layer.icon for layer in layers] for layers in padded])
        places = torch.tensor([[(layer.x, layer.y, layer.size) for layer in layers] for layers in padded], dtype=torch.float32)
        matrices = None
        if any(layer.matrix is not None for layers in scenes for layer in layers):
            same = torch.eye(3).flatten().tolist()
            matrices = torch.tensor([[layer.matrix or same for layer in layers] for layers in padded]).unflatten(2, (3, 3))
        x, y, size = places.unbind(2)
        return cls(icons, x, y, size, matrices)

    def __getitem__(self, key: Any) -> "Layers":
        """Layers with `tensor[key]` of each tensor."""
        return self._map(lambda tensor: tensor[key])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Layers":
        """Layers with `change` applied to each tensor."""
        changed: dict[str, Any] = {f.name: None if (t := getattr(self, f.name)) is None else change(t) for f in fields(self)}
        return Layers(**changed)


def compose(atlas: Tensor, layers: Layers, background: Tensor, size: int = 64) -> Tensor:
    """The scenes as uint8 images [B, 3, size, size], within 1 of `compose_sprites`.

    On a CPU padding layers are skipped; elsewhere, and in a compiled graph, all L layers are computed, and nothing is read
    back to the host.

    Args:
        atlas: uint8 [N, S, S, 4], RGBA sprites, on the layers' device.
        layers: The layers of the scenes.
        background: [B, 3], RGB colours from 0 to 255.
        size: Side of the images, in pixels.
    """
    device = layers.icons.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        ground = uint8_to_float(background)
        blend = _blend_few if device == "cpu" and not torch.compiler.is_compiling() else _blend_all
        canvas = blend(atlas, layers, ground[:, None, :, None].expand(-1, size, -1, size))  # [B, Y, 3, X]
        return float_to_uint8(canvas.clamp(0, 1)).transpose(1, 2).contiguous()


def _blend_all(atlas: Tensor, layers: Layers, canvas: Tensor) -> Tensor:
    """Blend all `layers` over `canvas` [B, Y, 3, X] in one batch."""
    count = layers.icons.shape[1]
    flat = layers._map(lambda tensor: tensor.flatten(0, 1))
    for patch in _patches(atlas, flat, canvas.shape[1]).unflatten(0, (-1, count)).unbind(1):
        canvas = _blend(patch, canvas)
    return canvas


def _blend_few(atlas: Tensor, layers: Layers, canvas: Tensor) -> Tensor:
    """The same in chunks, without padding layers, and recolouring only layers with a matrix of their own."""
    canvas = canvas.clone()
    present, matrices = layers.icons >= 0, layers.matrices
    recoloured = torch.zeros_like(present) if matrices is None else (matrices != torch.eye(3)).flatten(2).any(2)
    unchanged = replace(layers, matrices=None)
    for number in range(present.shape[1]):
        for of, chosen in ((unchanged, present & ~recoloured), (layers, present & recoloured)):
            rows = chosen[:, number].nonzero()[:, 0]
            for some in rows.split(_CHUNK) if len(rows) else ():
                canvas[some] = _blend(_patches(atlas, of[some, number], canvas.shape[1]), canvas[some])
    return canvas


def _blend(patch: Tensor, canvas: Tensor) -> Tensor:
    """Premultiplied RGBA [B, Y, 4, X] over RGB [B, Y, 3, X]."""
    return canvas * (1 - patch[:, :, 3:]) + patch[:, :, :3]


def _patches(atlas: Tensor, layers: Layers, size: int) -> Tensor:
    """Single `layers` [K] resampled onto their images: premultiplied RGBA [K, Y, 4, X]; 0 outside and for padding."""
    source = uint8_to_float(atlas[layers.icons.clamp_min(0)].transpose(2, 3))  # [K, S, 4, S]
    rgb, alpha = source[:, :, :3], source[:, :, 3:]
    if layers.matrices is not None:
        rgb = _recolour(rgb, layers.matrices)
    alpha = alpha * (layers.icons >= 0)[:, None, None, None]
    premultiplied = torch.cat([rgb * alpha, alpha], 2)
    side = layers.size * size
    rows, columns = (_area_weights(atlas.shape[1], at * size - side / 2, side, size) for at in (layers.y, layers.x))
    down = torch.bmm(rows, premultiplied.flatten(2))  # [K, Y, 4 S]
    across = torch.bmm(down.unflatten(2, (4, -1)).flatten(1, 2), columns.mT)  # [K, Y 4, X]
    return across.unflatten(1, (size, 4))


def _recolour(rgb: Tensor, matrices: Tensor) -> Tensor:
    """`rgb` [K, S, 3, S] in [0, 1] through colour matrices [K, 3, 3], clamped to [0, 1]; exact for the unit matrix."""
    of_red, of_green, of_blue = (matrices[:, None, :, n, None] for n in range(3))  # [K, 1, 3, 1]
    red, green, blue = rgb.split(1, 2)
    return (red * of_red + green * of_green + blue * of_blue).clamp(0, 1)


def _area_weights(source: int, start: Tensor, side: Tensor, count: int) -> Tensor:
    """[K, count, source]: the overlap of each source cell with each of `count` pixels, in pixels.

    As in `render`; the sprite begins `start` [K] pixels from the image's edge and is `side` [K] pixels long.
    """
    step = (side / source)[:, None, None]
    cells = start[:, None, None] + step * torch.arange(source, device=start.device)
    pixels = torch.arange(count, device=start.device)[:, None]
    return (torch.minimum(pixels + 1, cells + step) - torch.maximum(pixels, cells)).clamp_min(0)
