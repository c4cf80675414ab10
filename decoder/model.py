"""The 64 px decoder: a lean UNet on 2x2 pixel-unshuffled pictures, called as diffusers' `UNet2DConditionModel`."""

# B batch, C channels, H height, W width, N context tokens, K context width, T time-embedding width

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from prior.blocks import AttentionFunction, Checkpointed, set_attention
from prior.storage import Int8Storage

from .blocks import ChannelNorm, ResBlock, SpatialAttention, Upsample
from .draft import DraftSkip


@dataclass
class DecoderOutput(UNet2DConditionOutput):
    """`sample` [B, out_channels, H, W]; `name_shares` of each attention layer [B, h*w], where `names` were given."""

    name_shares: tuple[Tensor, ...] | None = None


class Decoder(Checkpointed, Int8Storage, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """UNet whose levels halve the resolution from `sample_size / 2`; `attention` says which levels attend, and with
    `positions` they know where a pixel is.

    The output starts at zero. Seven `in_channels` are the noised picture, the part of the picture that is kept and the mask
    of what is not; six `out_channels` are the prediction and its variance. Sizes other than `sample_size` work when they
    are multiples of `stride`. With `draft_channels` a low-resolution draft of the image (`DraftHead`) enters beside the
    pixel-unshuffled sample, through a convolution of its own that is zero at the start; with `draft_skip` sample and draft
    are connected with the output too (`DraftSkip`).
    With `position_maps` every level adds a learned map [C, H, W] to its input, zero at the start;
    for other sizes than `sample_size` it is resized.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: Sequence[int] = (96, 192, 320),
        blocks: Sequence[int] = (2, 2, 2),
        attention: Sequence[bool] = (False, True, True),
        head_dim: int = 64,
        cross_attention_dim: int = 384,
        time_embed_dim: int = 512,
        dropout: float = 0.0,
        positions: bool = False,
        draft_channels: int = 0,
        draft_skip: bool = False,
        position_maps: bool = False,
    ):
        super().__init__()
        if not len(channels) == len(blocks) == len(attention):
            raise ValueError(
                f"channels {list(channels)}, blocks {list(blocks)} and attention {list(attention)} must be equally long"
            )
        if draft_skip and not in_channels == out_channels == draft_channels == 3:
            raise ValueError(
                f"draft_skip needs 3 in_channels, out_channels and draft_channels, got {in_channels}, {out_channels} and "
                f"{draft_channels}"
            )
        self.stride = 2 ** len(channels)
        if sample_size % self.stride:
            raise ValueError(f"sample_size ({sample_size}) must be a multiple of {self.stride}")
        self.time_embedding = nn.Sequential(
            nn.Linear(channels[0], time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim)
        )

        def stage(channels_in: int, channels_out: int, attend: bool) -> nn.ModuleDict:
            parts = nn.ModuleDict({"block": ResBlock(channels_in, channels_out, time_embed_dim, dropout)})
            if attend:
                parts["attention"] = SpatialAttention(channels_out, cross_attention_dim, head_dim, positions)
            return parts

        self.conv_in = nn.Conv2d(4 * in_channels, channels[0], 3, padding=1)
        self.draft_in = nn.Conv2d(draft_channels, channels[0], 3, padding=1, bias=False) if draft_channels else None
        if draft_channels:
            nn.init.zeros_(self.draft_in.weight)
        sides = [sample_size // 2 ** (level + 1) for level in range(len(channels))]
        maps = [torch.zeros(1, c, s, s) for c, s in zip(channels, sides, strict=True)] if position_maps else []
        self.position_embeddings = nn.ParameterList(maps)
        self.down, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        skips, width = [], channels[0]
        for level, (count, attend) in enumerate(zip(blocks, attention, strict=True)):
            if level:
                self.downsamplers.append(nn.Conv2d(width, channels[level], 3, stride=2, padding=1))
                width = channels[level]
            self.down.append(nn.ModuleList(stage(width, width, attend) for _ in range(count)))
            skips += [width] * count
        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])
        self.up, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(channels))):
            if level != len(channels) - 1:
                self.upsamplers.append(Upsample(width, channels[level]))
                width = channels[level]
            self.up.append(nn.ModuleList(stage(width + skips.pop(), width, attention[level]) for _ in range(blocks[level])))
        self.norm_out = ChannelNorm(width)
        self.conv_out = nn.Conv2d(width, 4 * out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.draft_out = DraftSkip(width, time_embed_dim) if draft_skip else None

    def set_attn_processor(self, function: AttentionFunction) -> None:
        """Use `function` for every attention of the network."""
        set_attention(self, function)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        draft: Tensor | None = None,
    ):
        """`sample` [B, in_channels, H, W]; `timestep` a number or [B]; `encoder_hidden_states` [B, N, K]; `class_labels`
        [B, T], added to the time embedding; `attention_mask` [B, N] bool, True where a context token may be attended;
        `cross_attention_kwargs` may have `kept`, the context's keys and values by layer, and `names` [B, N], which are 1 and
        -1 for the tokens of two names and 0 elsewhere: every attention layer then tells how it divides between the two.
        `draft` [B, draft_channels, R, R] is resized to the first level, and left out (zeros) where it is None or the sample is
        not square.
        """
        if sample.shape[-1] % self.stride or sample.shape[-2] % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {list(sample.shape[-2:])}")
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # a single one is embedded once
        emb = get_timestep_embedding(timestep, self.config.channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        emb = self.time_embedding(emb.to(self.dtype))  # [B, T]
        if class_labels is not None:
            emb = emb + class_labels
        emb = F.silu(emb)
        context, more = encoder_hidden_states, cross_attention_kwargs or {}
        kept, names, shares = more.get("kept"), more.get("names"), []

        def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
            x = self.run(parts["block"], x, emb)
            if "attention" in parts:
                x = self.run(parts["attention"], x, context, _with_pixels(attention_mask, x), kept, names)
                if names is not None:
                    x, share = x
                    shares.append(share)
            return x

        x = self.conv_in(_channels_last(F.pixel_unshuffle(sample, 2), self.conv_in))  # [B, C, H/2, W/2]
        has_draft = self.draft_in is not None and draft is not None and sample.shape[2] == sample.shape[3]
        if has_draft:
            x = x + self.draft_in(_channels_last(_resized(draft, x), self.draft_in))
        skips = []
        for level, stages in enumerate(self.down):
            if level:
                x = self.downsamplers[level - 1](x)
            if self.config.position_maps:
                x = x + _resized(self.position_embeddings[level], x)
            for parts in stages:
                x = run(parts, x)
                skips.append(x)
        for parts in self.middle:
            x = run(parts, x)
        for level, stages in enumerate(self.up):
            if level:
                x = self.upsamplers[level - 1](x)
            for parts in stages:
                x = run(parts, torch.cat([x, skips.pop()], 1))
        features = F.silu(self.norm_out(x))  # [B, C, H/2, W/2]
        x = F.pixel_shuffle(self.conv_out(features), 2)  # [B, out_channels, H, W]
        if has_draft and self.draft_out is not None:
            x = self.draft_out(x, sample, _resized(draft, x), features, emb)
        given = (x,) if names is None else (x, tuple(shares))
        return DecoderOutput(*given) if return_dict else given


def _resized(image: Tensor, x: Tensor) -> Tensor:
    """`image` [B, C, h, w] at the height and width of `x`, in its dtype."""
    if image.shape[2:] != x.shape[2:]:
        image = F.interpolate(image, x.shape[2:], mode="bilinear", align_corners=False)
    return image.to(x.dtype)


def _with_pixels(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask over context tokens [B, N] as one over [context, pixels]: [B, 1, 1, N + H*W]."""
    if mask is None:
        return None
    return F.pad(mask.bool(), (0, x.shape[2] * x.shape[3]), value=True)[:, None, None, :]


def _channels_last(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`x` in the memory layout of the network's own weights: pixel-unshuffling loses it."""
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x
