"""What is done to a low-resolution picture before an upsampler is trained on it (paper, section 2.3).

A picture drawn by the stage below is never as clean as a real one made small; an upsampler that has only seen real ones
sharpens its faults.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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


def noise_labels(sigma: Tensor) -> Tensor:
    """How an upsampler is told of pixel noise of standard deviation `sigma` [B]: in thousandths, as it is of timesteps."""
    return 1000 * sigma


def corrupt(pictures: Tensor, random: Tensor, noise: Tensor, blur: float, grain: float) -> Tensor:
    """Blur with sigma up to `blur` pixels, then noise of up to `grain`; `random` [B, >=2] in [0, 1) sets each amount."""
    return add_noise(gaussian_blur(pictures, blur * random[:, 0]), grain * random[:, 1], noise)


# ---------------------------------------------------------------------------------------------- BSR

RESIZES = ("bilinear", "bicubic", "area")


def bsr(picture: Tensor, rng: np.random.Generator, scale: int = 4) -> Tensor:
    """A picture [3, H, W] in [0, 1] degraded as by BSRGAN and `scale` times smaller: [3, H / scale, W / scale] in [0, 1].

    Two blurs (one isotropic, one not), two changes of size, noise, JPEG and a camera's noise, in random order, then JPEG
    once more (arXiv 2103.14006, section 3). The paper's second upsampler is trained on it, and so is that of latent
    diffusion (arXiv 2112.10752). Raises ValueError for sides that are no multiples of `scale`.
    """
    height, width = picture.shape[1:]
    if height % scale or width % scale:
        raise ValueError(f"height and width must be multiples of {scale}, got {[height, width]}")
    low = (height // scale, width // scale)
    x = picture[None].float()
    if scale == 4 and rng.random() < 0.25:
        x = _resize(x, (height // 2, width // 2), _choose(rng))
    steps = [_isotropic, _anisotropic, _through_another_size, _gaussian_noise, _jpeg_noise, _camera_noise]
    order = [steps[n] for n in rng.permutation(len(steps))]
    order.insert(int(rng.integers(order.index(_through_another_size) + 1, len(order) + 1)), _to_size)
    for step in order:
        x = step(x, low, rng).clamp(0, 1)
    return jpeg(x, int(rng.integers(30, 96)))[0]


def jpeg(pictures: Tensor, quality: int) -> Tensor:
    """`pictures` [B, 3, H, W] in [0, 1] after JPEG of `quality` from 1 to 95."""
    decoded = []
    for picture in (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1))
    return torch.stack(decoded).to(pictures) / 255


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


def _through_another_size(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Smaller or larger by a random factor, or every nth pixel after a blur: sizes that `_to_size` then leaves."""
    if rng.random() < 0.25:
        step = max(x.shape[-1] // low[1] // 2, 1)
        return _convolved(x, gaussian_kernel(21, (step * 0.6, step * 0.6)))[..., step // 2 :: step, step // 2 :: step]
    factor = rng.uniform(0.5, 2.0)
    return _resize(x, (max(round(low[0] * factor), 2), max(round(low[1] * factor), 2)), _choose(rng))


def _to_size(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    return _resize(x, low, _choose(rng))


def _gaussian_noise(x: Tensor, low: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Of standard deviation 2 to 25 of 255: the same in all colours, each colour's own, or correlated between them."""
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
    """A sensor's shot and read noise, which grow with the light that fell, in linear light; for a quarter of the pictures."""
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
    corners = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(x, size, mode=mode, **corners)


def _choose(rng: np.random.Generator) -> str:
    return RESIZES[int(rng.integers(len(RESIZES)))]


def _odd(rng: np.random.Generator) -> int:
    """A kernel's size: 7, 9, ... 21."""
    return 7 + 2 * int(rng.integers(8))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
