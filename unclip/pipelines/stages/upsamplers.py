"""The upsamplers: 64 px to 256 px, and 256 px to 1024 px (paper, section 2.1)."""

# B images, h and w: height and width before, H and W after

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from upsamplers.degrade import add_noise, noise_labels

from ...diffusion.sampling import Predict, Scheduler, noise
from ...diffusion.tiling import tiled
from ...networks import is_noise_conditioned
from ..call import Call, in_batches, joined
from ..sizes import stride

if TYPE_CHECKING:
    from ..base import UnCLIPBase

TILE_OVERLAP = 0.25  # of a tile's side, when an image is larger than its upsampler was trained for


@dataclass
class UpsamplerStage:
    """The name of a stage, the component names of its network in each step, and its scheduler."""

    name: str
    networks: list[str]
    scheduler: Scheduler


def upsample_256(pipe: "UnCLIPBase", images: Iterable[Tensor], call: Call, latents: Tensor | None = None) -> Iterable[Tensor]:
    """Batches of images from 64 px to 256 px; unchanged where the call ends before. Karlo's last step has another network."""
    if call.last < 1:
        return images
    steps = call.settings.super_res_num_inference_steps
    last = "super_res_first" if pipe.super_res_last is None else "super_res_last"
    names = ["super_res_first"] * (steps - 1) + [last]
    stage = partial(_upsample, stage=UpsamplerStage("upsampler_256", names, pipe.super_res_scheduler))
    return in_batches(pipe, stage, call, images=joined(images), latents=latents)


def upsample_1024(pipe: "UnCLIPBase", images: Iterable[Tensor], call: Call) -> Iterable[Tensor]:
    """Batches of images from 256 px to 1024 px; unchanged where the call ends before."""
    if call.last < 2:
        return images
    names = ["upsampler_1024"] * call.settings.upsampler_1024_num_inference_steps
    stage = partial(_upsample, stage=UpsamplerStage("upsampler_1024", names, pipe.upsampler_1024_scheduler))
    return in_batches(pipe, stage, call, images=joined(images), latents=None)


def _upsample(pipe: "UnCLIPBase", images: Tensor, latents: Tensor | None, call: Call, stage: UpsamplerStage) -> Tensor:
    """Images [B, 3, h, w] in [-1, 1] to [B, 3, H, W]; unchanged once interrupted.

    The inputs of a noise-conditioned upsampler get noise of the level `upsampler_noise_level` (arXiv 2106.15282, section
    4.2): it then replaces artefacts of the stage before.
    """
    if pipe.interrupt:
        return images
    networks = [cast(ModelMixin, getattr(pipe, name)) for name in stage.networks]
    scale = int(networks[0].config["sample_size"]) // pipe.sizes[0]
    height, width = call.height * scale, call.width * scale
    level = call.settings.upsampler_noise_level if is_noise_conditioned(networks[0]) else 0.0
    with pipe._run_stage(stage.name, *stage.networks):
        if level:
            pixel_noise = noise(tuple(images.shape), call.generator, images.device, images.dtype)
            images = add_noise(images, images.new_full((len(images),), level), pixel_noise)
        images = images if images.dtype == torch.float64 else images.float()
        low = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
        shape = (len(images), images.shape[1], height, width)
        start = pipe._starting_noise(shape, networks[0], call.generator, latents)
        predict = _prediction(pipe, networks, low, level)
        return pipe._denoise(predict, start, stage.scheduler, len(networks), call).clamp(-1, 1)


def _prediction(pipe: "UnCLIPBase", networks: list[ModelMixin], low: Tensor, level: float) -> Predict:
    """The upsamplers, one for each step, as a function of the noised images and the timestep; in tiles where they are large.

    `low` [B, 3, H, W] are the resized low-resolution images, `level` is their noise level.
    """
    tile = int(networks[0].config["sample_size"])
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
