"""Degradation of the low-resolution images that an upsampler is trained on (paper, section 2.3).

Samples of the stage before have artefacts that downscaled real images lack; an upsampler trained on the latter alone
sharpens them.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def gaussian_blur(images: Tensor, sigma: Tensor, size: int = 3) -> Tensor:
    """`images` [B, 3, H, W] blurred with standard deviations `sigma` [B] in pixels, 0 for none, and a kernel of `size` taps."""
    at = torch.arange(size, device=images.device, dtype=images.dtype) - size // 2
    taps = torch.exp(-0.5 * (at / sigma.to(images)[:, None].clamp_min(1e-3)) ** 2)  # [B, size]
    taps = taps / taps.sum(1, keepdim=True)
    batch, channels, height, width = images.shape
    kernels = (taps[:, :, None] * taps[:, None, :]).repeat_interleave(channels, 0)[:, None]  # [B*3, 1, size, size]
    padded = F.pad(images, [size // 2] * 4, mode="replicate")
    blurred = F.conv2d(padded.view(1, batch * channels, *padded.shape[2:]), kernels, groups=batch * channels)
    return blurred.view(batch, channels, height, width)


def add_noise(images: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Images in [-1, 1] with pixel noise of a standard deviation each, `sigma` [B]."""
    return (images + sigma.to(images)[:, None, None, None] * noise.to(images)).clamp(-1, 1)


def noise_labels(sigma: Tensor) -> Tensor:
    """The class labels for pixel noise of standard deviation `sigma` [B]: in thousandths, the range of timesteps."""
    return 1000 * sigma


def corrupt(images: Tensor, random: Tensor, noise: Tensor, blur: float, grain: float) -> Tensor:
    """Blur with sigma up to `blur` pixels, then noise of up to `grain`; `random` [B, >=2] in [0, 1) sets each amount."""
    return add_noise(gaussian_blur(images, blur * random[:, 0]), grain * random[:, 1], noise)


# ---------------------------------------------------------------------------------------------- BSR

RESIZES = ("bilinear", "bicubic", "area")


def bsr(image: Tensor, rng: np.random.Generator, scale: int = 4) -> Tensor:
    """An image [3, H, W] in [0, 1] degraded as by BSRGAN and `scale` times smaller: [3, H / scale, W / scale] in [0, 1].

    Two blurs (one isotropic, one not), two changes of size, noise, JPEG and a camera's noise, in random order, then JPEG
    once more (arXiv 2103.14006, section 3). The paper's second upsampler is trained on it, and so is that of latent
    diffusion (arXiv 2112.10752). Raises ValueError for sides that are no multiples of `scale`.
    """
    height, width = image.shape[1:]
    if height % scale or width % scale:
        raise ValueError(f"height and width must be multiples of {scale}, got {[height, width]}")
    low = (height // scale, width // scale)
    x = image[None].float()
    if scale == 4 and rng.random() < 0.25:
        x = _resize(x, (height // 2, width // 2), _choose(rng))
    steps = [_isotropic, _anisotropic, _resize_randomly, _gaussian_noise, _jpeg_noise, _camera_noise]
    order = [steps[n] for n in rng.permutation(len(steps))]
    order.insert(int(rng.integers(order.index(_resize_randomly) + 1, len(order) + 1)), _to_size)
    for step in order:
        x = step(x, low, rng).clamp(0, 1)
    return jpeg(x, int(rng.integers(30, 96)))[0]


def jpeg(images: Tensor, quality: int) -> Tensor:
    """`images` [B, 3, H, W] in [0, 1] after JPEG of `quality` from 1 to 95."""
    decoded = []
    for image in (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1))
    return torch.stack(decoded).to(images) / 255


def gaussian_kernel(size: int, widths: tuple[float, float], angle: float = 0.0) -> Tensor:
    """A kernel [size, size] that sums to 1: standard deviations `widths` in pixels along axes turned by `angle` radians."""
    at = torch.arange(size, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((along / widths[0]) ** 2 + (across / widths[1]) ** 2))
    return kernel / kernel.sum()


def _isotropic(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    width = rng.uniform(0.1, 2.8)
    return _convolved(x, gaussian_kernel(_odd(rng), (width, width)))


def _anisotropic(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    return _convolved(x, gaussian_kernel(_odd(rng), (rng.uniform(0.5, 8.0), rng.uniform(0.5, 8.0)), rng.uniform(0, math.pi)))


def _resize_randomly(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Resized by a random factor, or every nth pixel after a blur; `_to_size` resizes again later."""
    if rng.random() < 0.25:
        step = max(x.shape[-1] // low[1] // 2, 1)
        return _convolved(x, gaussian_kernel(21, (step * 0.6, step * 0.6)))[..., step // 2 :: step, step // 2 :: step]
    factor = rng.uniform(0.5, 2.0)
    return _resize(x, (max(round(low[0] * factor), 2), max(round(low[1] * factor), 2)), _choose(rng))


def _to_size(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    return _resize(x, low, _choose(rng))


def _gaussian_noise(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Of standard deviation 2 to 25 of 255: the same in all colours, independent, or correlated between them."""
    sigma, kind = rng.uniform(2, 25) / 255, rng.random()
    noise = _normal(rng, x.shape if kind < 0.6 else (1, 1, *x.shape[2:]))
    if kind < 0.2:
        axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        mix = torch.from_numpy(axes @ np.diag(rng.random(3))).float()  # its covariance has eigenvalues up to 1
        noise = torch.einsum("ij,bjhw->bihw", mix, noise)
    return x + sigma * noise


def _jpeg_noise(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    return jpeg(x, int(rng.integers(30, 96))) if rng.random() < 0.75 else x


def _camera_noise(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """A sensor's shot and read noise, which grow with the light that fell, in linear light; for a quarter of the images."""
    if rng.random() >= 0.25:
        return x
    shot, read = math.exp(rng.uniform(math.log(1e-4), math.log(1e-2))), rng.uniform(1e-4, 5e-3)
    linear = x.clamp(0, 1) ** 2.2
    noisy = linear + (shot * linear + read**2).sqrt() * _normal(rng, x.shape)
    return noisy.clamp(0, 1) ** (1 / 2.2)


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    margin = kernel.shape[-1] // 2
    padded = F.pad(x, [margin] * 4, mode="replicate")
    return F.conv2d(padded, kernel.to(x).expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(x, size, mode=mode, align_corners=None if mode == "area" else False)


def _choose(rng: np.random.Generator) -> str:
    return RESIZES[int(rng.integers(len(RESIZES)))]


def _odd(rng: np.random.Generator) -> int:
    """A kernel's size: 7, 9, ... 21."""
    return 7 + 2 * int(rng.integers(8))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
