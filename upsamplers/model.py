"""Both upsamplers: one convolutional UNet without attention, called as diffusers' `UNet2DModel`."""

# B batch, C channels, H height, W width, u the pixel-unshuffle factor

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from decoder.blocks import ChannelNorm, ResBlock, Upsample
from prior.blocks import Checkpointed, zero_module
from prior.storage import Int8Storage


class Upsampler(Checkpointed, Int8Storage, ModelMixin):
    """Predicts the high-resolution image (x0) from [noised image, low-resolution image resized to the same size].

    The network adds a residual, zero at initialisation, to the resized low-resolution image. Fully convolutional: trained on
    crops, run on images of any size that is a multiple of `stride`. With `class_embed_type` "timestep" it is conditioned on
    the noise level of the low-resolution image (arXiv 2106.15282, section 4), as diffusers' `UNet2DModel` with that setting.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
        self,
        sample_size: int = 256,
        in_channels: int = 6,
        out_channels: int = 3,
        unshuffle: int = 4,
        channels: Sequence[int] = (64, 96),
        blocks: Sequence[int] = (2, 2),
        time_embed_dim: int = 128,
        class_embed_type: str | None = None,
    ):
        super().__init__()
        if class_embed_type not in (None, "timestep"):
            raise ValueError(f"class_embed_type must be timestep or nothing, got {class_embed_type!r}")
        if len(channels) != len(blocks):
            raise ValueError(f"channels {list(channels)} and blocks {list(blocks)} must be equally long")
        if in_channels != 2 * out_channels:
            raise ValueError(f"in_channels ({in_channels}) must be twice out_channels ({out_channels})")
        self.stride = unshuffle * 2 ** (len(channels) - 1)
        self.time_embedding = nn.Sequential(
            nn.Linear(channels[0], time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim), nn.SiLU()
        )
        self.class_embedding = None
        if class_embed_type:
            self.class_embedding = nn.Sequential(
                nn.Linear(channels[0], time_embed_dim), nn.SiLU(), zero_module(nn.Linear(time_embed_dim, time_embed_dim))
            )
        self.conv_in = nn.Conv2d(in_channels * unshuffle**2, channels[0], 3, padding=1)
        self.down, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        width = channels[0]
        for level, count in enumerate(blocks):
            if level:
                self.downsamplers.append(nn.Conv2d(width, channels[level], 3, stride=2, padding=1))
                width = channels[level]
            self.down.append(nn.ModuleList(ResBlock(width, width, time_embed_dim) for _ in range(count)))
        self.up, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(channels) - 1)):
            self.upsamplers.append(Upsample(width, channels[level]))
            width = channels[level]
            sizes = [2 * width] + [width] * (blocks[level] - 1)
            self.up.append(nn.ModuleList(ResBlock(size, width, time_embed_dim) for size in sizes))
        self.norm_out = ChannelNorm(width)
        self.conv_out = zero_module(nn.Conv2d(width, out_channels * unshuffle**2, 3, padding=1))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """`sample` [B, 6, H, W], the noised image and the resized low-resolution one -> the high-resolution one [B, 3, H, W].

        `class_labels` [B] (`degrade.noise_labels`) for a network that is conditioned on the noise level, else None.
        """
        height, width = sample.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {[height, width]}")
        if (class_labels is None) != (self.class_embedding is None):
            what = "needs class_labels" if class_labels is None else "takes no class_labels"
            raise ValueError(f"an upsampler with class_embed_type {self.config['class_embed_type']!r} {what}")
        emb = self.time_embedding(self._sinusoids(timestep, sample))  # [B, T]
        if class_labels is not None and self.class_embedding is not None:
            emb = emb + self.class_embedding(self._sinusoids(class_labels, sample))
        unshuffle, out_channels = self.config["unshuffle"], self.config["out_channels"]
        x = F.pixel_unshuffle(sample, unshuffle)  # [B, 6 u^2, H/u, W/u]
        if self.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(x)
                x = self.downsamplers[level - 1](x)
            for block in cast(Iterable[nn.Module], blocks):
                x = self.run(block, x, emb)
        for upsampler, blocks in zip(self.upsamplers, self.up, strict=True):
            x = torch.cat([upsampler(x), skips.pop()], 1)
            for block in cast(Iterable[nn.Module], blocks):
                x = self.run(block, x, emb)
        residual = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), unshuffle)  # [B, 3, H, W]
        predicted = sample[:, out_channels:] + residual
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)

    def _sinusoids(self, numbers: Tensor | float | int, sample: Tensor) -> Tensor:
        """The sinusoidal embedding [B, C] of a number for all images, or one for each."""
        expanded = torch.as_tensor(numbers, device=sample.device).expand(len(sample))
        width = self.config["channels"][0]
        emb = get_timestep_embedding(expanded, width, flip_sin_to_cos=True, downscale_freq_shift=0)
        return emb.to(self.dtype)


def resize(low: Tensor, size: int) -> Tensor:
    """Bicubic enlargement [B, 3, h, w] -> [B, 3, size, size] in fp32 (it has no bf16 kernel on a CPU)."""
    return F.interpolate(low.float(), (size, size), mode="bicubic", align_corners=False, antialias=True).to(low.dtype)
