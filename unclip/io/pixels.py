"""Conversion between 8-bit images and the ranges of the networks' inputs."""

# H height, W width

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """An RGB image as [3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def uint8_to_float(images: Tensor) -> Tensor:
    """Images in [0, 255] to float32 in [0, 1]."""
    return images.float() / 255


def float_to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8, rounded."""
    return (images * 255).round().byte()


def normalize(images: Tensor) -> Tensor:
    """Images in [0, 255] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def denormalize(images: Tensor) -> Tensor:
    """Images in [-1, 1], clipped to it, to [0, 1]."""
    return (images / 2 + 0.5).clamp(0, 1)
