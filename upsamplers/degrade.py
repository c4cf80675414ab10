"""What is done to a low-resolution picture before an upsampler is trained on it (paper, section 2.3).

A picture drawn by the stage below is never as clean as a real one made small; an upsampler that has only seen real ones
sharpens its faults.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(pictures: Tensor, sigma: Tensor, size: int = 3) -> Tensor:
    """`pictures` [B, 3, H, W] blurred by each one's own `sigma` [B] in pixels, with a kernel of `size` taps; 0 leaves it."""
    at = torch.arange(size, device=pictures.device, dtype=pictures.dtype) - size // 2
    taps = torch.exp(-0.5 * (at / sigma.to(pictures)[:, None].clamp_min(1e-3)) ** 2)  # [B, size]
    taps = taps / taps.sum(1, keepdim=True)
    batch, channels, height, width = pictures.shape
    kernels = (taps[:, :, None] * taps[:, None, :]).repeat_interleave(channels, 0)[:, None]  # [B*3, 1, size, size]
    padded = F.pad(pictures, [size // 2] * 4, mode="replicate")
    blurred = F.conv2d(padded.view(1, batch * channels, *padded.shape[2:]), kernels, groups=batch * channels)
    return blurred.view(batch, channels, height, width)


def add_noise(pictures: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Pixel noise of each picture's own standard deviation `sigma` [B], in units of the pixels' range [-1, 1]."""
    return (pictures + sigma.to(pictures)[:, None, None, None] * noise.to(pictures)).clamp(-1, 1)


def corrupt(pictures: Tensor, random: Tensor, noise: Tensor, blur: float, grain: float) -> Tensor:
    """Blur with sigma up to `blur` pixels, then noise of up to `grain`; `random` [B, >=2] in [0, 1) sets each amount."""
    return add_noise(gaussian_blur(pictures, blur * random[:, 0]), grain * random[:, 1], noise)
