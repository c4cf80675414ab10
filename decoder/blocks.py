"""Convolutional blocks of the decoder and the upsamplers, lean where a CPU spends its time.

Pre-activation residual blocks with a LayerNorm over the channels of each pixel: on a CPU in channels_last it costs a
quarter of a GroupNorm, forward and backward. Images enter 2x2 or 4x4 pixel-unshuffled.
"""

# B batch, C channels, E embedding channels, H height, W width, N tokens

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.blocks import Attention, KeyValueCache, zero_module

FREQUENCIES = 2  # half waves over an image's side, and full ones


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel, without a bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, None, 1e-6)
        return pixels.permute(0, 3, 1, 2)  # [B, C, H, W]


class ResBlock(nn.Module):
    """x + conv(silu(modulate(norm(conv(silu(norm(x))))))), modulated by a scale and shift from `emb` when it has one.

    The second convolution starts at zero, so that a new block is the identity.
    """

    def __init__(self, channels_in: int, channels_out: int, emb_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.norm_in = ChannelNorm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(emb_dim, 2 * channels_out) if emb_dim else None
        self.norm_out = ChannelNorm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_module(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))  # [B, C, H, W]
        h = self.norm_out(h)
        if self.modulation is not None:
            scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, 1)  # each [B, C, 1, 1]
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


def position_encoding(height: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of each pixel's position relative to the image's height and width: [H*W, 4 * FREQUENCIES]."""
    shares = [(torch.arange(side, device=device) + 0.5) / side for side in (height, width)]
    halves = torch.pi * torch.arange(1, FREQUENCIES + 1, device=device)
    waves = torch.stack(torch.meshgrid(*shares, indexing="ij"), -1)[..., None] * halves  # [H, W, 2, FREQUENCIES]
    return torch.cat([waves.sin(), waves.cos()], -1).flatten(0, 1).flatten(1)


class SpatialAttention(nn.Module):
    """x + attention over its pixels and the context tokens; `positions` adds an encoding of each pixel's position.

    Its projection is zero at initialisation.
    """

    def __init__(self, channels: int, context_dim: int | None = None, head_dim: int = 64, positions: bool = False):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.position = zero_module(nn.Linear(4 * FREQUENCIES, channels, bias=False)) if positions else None
        self.attention = Attention(channels, head_dim, context_dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        kv_cache: KeyValueCache | None = None,
        names: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`mask`, `kv_cache` and `names` as `Attention` takes them; with `names` -> also the shares [B, H*W]."""
        height, width = x.shape[2:]
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, C]
        if self.position is not None:
            tokens = tokens + self.position(position_encoding(height, width, x.device).to(tokens))
        attended = self.attention(tokens, context, mask, kv_cache=kv_cache, names=names)
        if names is None:
            return x + attended.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        attended, shares = attended
        return x + attended.unflatten(1, (height, width)).permute(0, 3, 1, 2), shares


class Upsample(nn.Module):
    """Doubles height and width: a 1x1 convolution at the low resolution, then nearest neighbours."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2, mode="nearest")
