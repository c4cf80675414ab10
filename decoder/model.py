"""The 64 px decoder: a lean UNet on 2x2 pixel-unshuffled images, called as diffusers' `UNet2DConditionModel`."""

# B batch, C channels, H height, W width, N context tokens, K context width, T time-embedding width

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from prior.blocks import AttentionFunction, Checkpointed, KeyValueCache, set_attention, zero_module
from prior.storage import Int8Storage

from .blocks import ChannelNorm, ResBlock, SpatialAttention, Upsample
from .draft import DraftSkip


@dataclass
class DecoderOutput(UNet2DConditionOutput):
    """`sample` [B, out_channels, H, W]; `name_shares` of each attention layer [B, h*w], where `names` were given."""

    name_shares: tuple[Tensor, ...] | None = None


class BlockConditions(NamedTuple):
    """The inputs that every block of one forward pass shares."""

    emb: Tensor  # [B, T]
    context: Tensor  # [B, N, K]
    mask: Tensor | None  # [B, N] bool
    kv_cache: KeyValueCache | None
    names: Tensor | None  # [B, N]
    name_shares: list[Tensor]  # each attention layer appends its own, where `names` are given


class Decoder(Checkpointed, Int8Storage, ModelMixin, PeftAdapterMixin):
    """UNet whose levels halve the resolution from `sample_size / 2`; `attention` tells which levels have attention layers,
    with `positions` their inputs include an encoding of each pixel's position.

    The output is zero at initialisation. Seven `in_channels` are the noised image, the known part of the image and the
    inpainting mask; six `out_channels` are the prediction and its variance. Other sizes than `sample_size` have to be
    multiples of `stride`. With `draft_channels` a low-resolution draft of the image (`DraftHead`) is added to the first
    level's input through a separate convolution, zero at initialisation; `draft_skip` connects sample and draft with the
    output too (`DraftSkip`).
    With `position_maps` every level adds a learned map [C, H, W] to its input, zero at initialisation and
    resized for other sizes than `sample_size`.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
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
        self.stride = _checked_stride(sample_size, channels, blocks, attention)
        if draft_skip and (in_channels, out_channels, draft_channels) != (3, 3, 3):
            counts = f"{in_channels}, {out_channels} and {draft_channels}"
            raise ValueError(f"draft_skip needs 3 in_channels, out_channels and draft_channels, got {counts}")
        self.time_embedding = nn.Sequential(
            nn.Linear(channels[0], time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim)
        )

        def stage(channels_in: int, channels_out: int, attend: bool) -> nn.ModuleDict:
            parts = nn.ModuleDict({"block": ResBlock(channels_in, channels_out, time_embed_dim, dropout)})
            if attend:
                parts["attention"] = SpatialAttention(channels_out, cross_attention_dim, head_dim, positions)
            return parts

        self.conv_in = nn.Conv2d(4 * in_channels, channels[0], 3, padding=1)
        self.draft_in = None
        if draft_channels:
            self.draft_in = zero_module(nn.Conv2d(draft_channels, channels[0], 3, padding=1, bias=False))
        self.position_embeddings = nn.ParameterList(_position_maps(channels, sample_size) if position_maps else [])
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
        self.conv_out = zero_module(nn.Conv2d(width, 4 * out_channels, 3, padding=1))
        self.draft_out = DraftSkip(width, time_embed_dim) if draft_skip else None

    def set_attn_processor(self, function: AttentionFunction) -> None:
        """Use `function` for every attention of the network."""
        set_attention(self, function)

    def forward(  # noqa: PLR0913 - diffusers' interface
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        draft: Tensor | None = None,
    ) -> DecoderOutput | tuple[Tensor] | tuple[Tensor, tuple[Tensor, ...]]:
        """Predict from `sample` [B, in_channels, H, W] at `timestep`, a number or [B].

        Args:
            sample: the noised images, with the further channels of an inpainting decoder.
            timestep: one for all rows, or one each.
            encoder_hidden_states: context tokens [B, N, K].
            class_labels: [B, T], added to the time embedding.
            attention_mask: [B, N] bool, True where a context token may be attended.
            return_dict: return a `DecoderOutput` rather than a tuple.
            cross_attention_kwargs: may have `kv_cache`, the context's keys and values by attention layer, and `names` [B, N],
                1 and -1 for the tokens of two names and 0 elsewhere, for which every attention layer then returns its
                `name_shares`.
            draft: [B, draft_channels, R, R], resized to the first level; zeros where it is None or the sample is not square.
        """
        if sample.shape[-1] % self.stride or sample.shape[-2] % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {list(sample.shape[-2:])}")
        more = cross_attention_kwargs or {}
        if sample.shape[-1] != sample.shape[-2]:
            draft = None
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # a single one is embedded once
        emb = self._embed_time(timesteps, class_labels)
        names: Tensor | None = more.get("names")
        conditions = BlockConditions(emb, encoder_hidden_states, attention_mask, more.get("kv_cache"), names, [])
        x, skips = self._encode(self._embed_sample(sample, draft), conditions)
        for parts in cast(Sequence[nn.ModuleDict], self.middle):
            x = self._run_block(parts, x, conditions)
        x = self._decode(x, skips, conditions)
        features = F.silu(self.norm_out(x))  # [B, C, H/2, W/2]
        x = F.pixel_shuffle(self.conv_out(features), 2)  # [B, out_channels, H, W]
        if draft is not None and self.draft_out is not None:
            x = self.draft_out(x, sample, _resized(draft, x), timesteps, emb, features)
        shares = None if names is None else tuple(conditions.name_shares)
        if return_dict:
            return DecoderOutput(x, shares)
        return (x,) if shares is None else (x, shares)

    def _embed_time(self, timesteps: Tensor, added: Tensor | None) -> Tensor:
        """The embedding [B or 1, T] of timesteps [B or 1], with `added` [B, T], after the activation."""
        sinusoids = get_timestep_embedding(timesteps, self.config["channels"][0], flip_sin_to_cos=True, downscale_freq_shift=0)
        emb = self.time_embedding(sinusoids.to(self.dtype))  # [B, T]
        return F.silu(emb if added is None else emb + added)

    def _embed_sample(self, sample: Tensor, draft: Tensor | None) -> Tensor:
        """The first level's input [B, C, H/2, W/2]."""
        x = self.conv_in(_channels_last(F.pixel_unshuffle(sample, 2), self.conv_in))
        if self.draft_in is not None and draft is not None:
            x = x + self.draft_in(_channels_last(_resized(draft, x), self.draft_in))
        return x

    def _encode(self, x: Tensor, conditions: BlockConditions) -> tuple[Tensor, list[Tensor]]:
        """The levels down: -> the features of the lowest one, and every block's output for the skip connections."""
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.downsamplers[level - 1](x)
            if self.config["position_maps"]:
                x = x + _resized(self.position_embeddings[level], x)
            for parts in cast(Sequence[nn.ModuleDict], blocks):
                x = self._run_block(parts, x, conditions)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], conditions: BlockConditions) -> Tensor:
        """The levels up, which use up `skips`."""
        for level, blocks in enumerate(self.up):
            if level:
                x = self.upsamplers[level - 1](x)
            for parts in cast(Sequence[nn.ModuleDict], blocks):
                x = self._run_block(parts, torch.cat([x, skips.pop()], 1), conditions)
        return x

    def _run_block(self, parts: nn.ModuleDict, x: Tensor, conditions: BlockConditions) -> Tensor:
        emb, context, mask, kv_cache, names, name_shares = conditions
        x = self.run(parts["block"], x, emb)
        if "attention" in parts:
            x = self.run(parts["attention"], x, context, _with_pixels(mask, x), kv_cache, names)
            if names is not None:
                x, shares = x
                name_shares.append(shares)
        return x


def _position_maps(channels: Sequence[int], sample_size: int) -> list[Tensor]:
    """A map of zeros [1, C, H, H] for every level."""
    sides = [sample_size // 2 ** (level + 1) for level in range(len(channels))]
    return [torch.zeros(1, c, side, side) for c, side in zip(channels, sides, strict=True)]


def _checked_stride(sample_size: int, channels: Sequence[int], blocks: Sequence[int], attention: Sequence[bool]) -> int:
    """The factor by which the levels reduce height and width. Raises ValueError for sizes that do not fit each other."""
    if not len(channels) == len(blocks) == len(attention):
        lists = f"channels {list(channels)}, blocks {list(blocks)} and attention {list(attention)}"
        raise ValueError(f"{lists} must be equally long")
    stride: int = 2 ** len(channels)
    if sample_size % stride:
        raise ValueError(f"sample_size ({sample_size}) must be a multiple of {stride}")
    return stride


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
    """`x` in the memory layout of the weights of `conv`: pixel-unshuffling loses it."""
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x
