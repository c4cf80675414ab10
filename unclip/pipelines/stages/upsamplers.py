"""The upsamplers: 64 px to 256 px, and 256 px to 1024 px (paper, section 2.1)."""

# B images, h and w: height and width before, H and W after

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upsamplers.degrade import add_noise, noise_labels

from ...diffusion.sampling import Predict, noise
from ...diffusion.tiling import tiled
from ...networks import is_noise_conditioned
from ..call import Call, in_batches, joined
from ..sizes import stride

if TYPE_CHECKING:
    from ..base import UnCLIPBase

TILE_OVERLAP = 0.25  # of a tile's side, when an image is larger than its upsampler was made for


def upsample_256(pipe: "UnCLIPBase", images: Iterable[Tensor], call: Call, latents: Tensor | None = None) -> Iterable[Tensor]:
    """Batches of images from 64 px to 256 px; as they are where the call ends below. Karlo's last step has its own network."""
    if call.last < 1:
        return images
    steps = call.settings.super_res_num_inference_steps
    last = "super_res_first" if pipe.super_res_last is None else "super_res_last"
    names = ["super_res_first"] * (steps - 1) + [last]
    stage = partial(_upsample, stage="upsampler_256", names=names, scheduler=pipe.super_res_scheduler)
    return in_batches(pipe, stage, call, images=joined(images), latents=latents)


def upsample_1024(pipe: "UnCLIPBase", images: Iterable[Tensor], call: Call) -> Iterable[Tensor]:
    """Batches of images from 256 px to 1024 px; as they are where the call ends below."""
    if call.last < 2:
        return images
    names = ["upsampler_1024"] * call.settings.upsampler_1024_num_inference_steps
    stage = partial(_upsample, stage="upsampler_1024", names=names, scheduler=pipe.upsampler_1024_scheduler)
    return in_batches(pipe, stage, call, images=joined(images), latents=None)


def _upsample(
    pipe: "UnCLIPBase", images: Tensor, latents: Tensor | None, call: Call, stage: str, names: list[str], scheduler: Any
) -> Tensor:
    """Images [B, 3, h, w] in [-1, 1] to [B, 3, H, W]; `names` has each step's network. As they are once interrupted.

    A noise-conditioned upsampler's inputs get as much noise as the setting `upsampler_noise_level` says (arXiv 2106.15282,
    section 4.2): it then draws anew what the stage below got wrong.
    """
    if pipe.interrupt:
        return images
    networks = [getattr(pipe, name) for name in names]
    scale = int(networks[0].config.sample_size) // pipe.sizes[0]
    height, width = call.height * scale, call.width * scale
    level = call.settings.upsampler_noise_level if is_noise_conditioned(networks[0]) else 0.0
    with pipe._run_stage(stage, *names):
        if level:
            pixel_noise = noise(tuple(images.shape), call.generator, images.device, images.dtype)
            images = add_noise(images, images.new_full((len(images),), level), pixel_noise)
        images = images if images.dtype == torch.float64 else images.float()
        low = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
        shape = (len(images), images.shape[1], height, width)
        start = pipe._starting_noise(shape, networks[0], call.generator, latents)
        predict = _prediction(pipe, networks, low, level)
        return pipe._denoise(predict, start, scheduler, len(networks), call).clamp(-1, 1)


def _prediction(pipe: "UnCLIPBase", networks: list, low: Tensor, level: float) -> Predict:
    """The upsamplers, one for each step, as a function of the noised images and the timestep; in tiles where they are large.

    `low` [B, 3, H, W] are the low-resolution images, resized; `level` is the noise level that they have.
    """
    tile = int(networks[0].config.sample_size)
    remaining = iter(networks)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        network = next(remaining)
        inputs = torch.cat([x, low], 1).to(network.dtype)
        labels = {}
        if is_noise_conditioned(network):
            labels["class_labels"] = noise_labels(x.new_full((len(x),), level))

        def predict_tile(part: Tensor) -> Tensor:
            return network(sample=part, timestep=t, **labels).sample.to(x.dtype, copy=pipe._shared.compiled)

        return tiled(predict_tile, inputs, tile, int(tile * TILE_OVERLAP), stride(network))

    return predict
