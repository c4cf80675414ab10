"""Real renders of single icons: in the pose of training, or at other sizes and places."""

# N images

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from decoder.layout import POSE_SIZE

from ..data.icons import IconSet
from ..data.render import Layer, compose_sprites

POSE = (0.5, 0.5, POSE_SIZE)  # x, y and size of a single icon, as fractions of the image's side
SIZES, PLACES = (0.84, 0.98), (0.48, 0.52)  # ranges of icons that are not in this pose


def in_pose(icons: IconSet, rows: Sequence[int], scale: float = 1.0) -> Tensor:
    """The icons of these rows centred on white at the size of `POSE` times `scale`: uint8 [N, 3, 64, 64]."""
    x, y, size = POSE
    return render_layers(icons, [Layer(row, x, y, size * scale) for row in rows])


def jittered(icons: IconSet, rows: Sequence[int], seed: int) -> Tensor:
    """The icons of these rows, each at a random size and place: uint8 [N, 3, 64, 64]."""
    rng = np.random.default_rng([seed, 8])
    return render_layers(icons, [Layer(row, *random_place(rng)) for row in rows])


def random_place(rng: np.random.Generator) -> tuple[float, float, float]:
    """x, y and size of an icon, uniform between `PLACES` and `SIZES`."""
    return rng.uniform(*PLACES), rng.uniform(*PLACES), rng.uniform(*SIZES)


def render_layers(icons: IconSet, layers: Sequence[Layer]) -> Tensor:
    """Each layer in an image of its own on white: uint8 [N, 3, 64, 64]."""
    images = np.stack([compose_sprites([layer], icons.sprites, 64) for layer in layers])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
