"""The CLIP that prior and decoder are trained against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...clip.model import CLIP
from ...clip.towers import tower_mask
from ...data.embeddings import EmbeddingCache
from ...io.checkpoints import components_folder
from ...networks import embedding_dim
from ...runtime.config import ConfigError, maker

LENGTHS = 4  # a text's length is a multiple of this, where it is not that of the tower


class FrozenCLIP(nn.Module):
    """The CLIP that a stage is trained against, without gradients."""

    scale: Tensor
    shift: Tensor
    empty_tokens: Tensor
    empty_mask: Tensor

    def __init__(self, clip: CLIP):
        super().__init__()
        self.towers = nn.ModuleDict({"text": clip.text_encoder, "image": clip.image_encoder}).requires_grad_(False).eval()
        self.clip = clip
        self.dim = embedding_dim(clip.text_encoder)
        # from images in [-1, 1] to the image tower's normalisation
        scale = 0.5 / torch.tensor(clip.feature_extractor.image_std).view(1, 3, 1, 1)
        shift = 2 * scale * (0.5 - torch.tensor(clip.feature_extractor.image_mean).view(1, 3, 1, 1))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        empty = clip.tokenize([""])
        self.register_buffer("empty_tokens", empty.input_ids, persistent=False)
        self.register_buffer("empty_mask", empty.attention_mask.bool(), persistent=False)
        self.fingerprint = clip.fingerprint

    @classmethod
    def load(cls, model: str) -> "FrozenCLIP":
        """The CLIP of a training run or of a pipeline, in fp32 and channels_last."""
        clip = CLIP.from_pretrained(str(components_folder(model)), dtype=torch.float32)
        image_tower: Any = clip.image_encoder
        image_tower.to(memory_format=torch.channels_last)
        return cls(clip)

    def train(self, mode: bool = True) -> "FrozenCLIP":
        return super().train(False)

    def tokenize(self, captions: list[str], fixed: bool = True, offsets: bool = False) -> dict[str, Tensor]:
        """`tokens` [B, N] int64 and `mask` [B, N] bool of captions, on the CPU.

        N is the tower's length, or, if it is not `fixed`, the longest caption's, rounded up to a multiple of `LENGTHS`.
        With `offsets` there are also the `offsets` [B, N, 2] of the first character that a token spells and of the one past
        the last; 0 and 0 of none.
        """
        tokens: Any = self.clip.tokenize(captions)
        found = {"tokens": tokens.input_ids, "mask": tokens.attention_mask.bool()}
        if offsets:
            found["offsets"] = torch.tensor([encoding.offsets for encoding in tokens.encodings or ()])
        length = found["tokens"].shape[1] if fixed else unpadded_length(found["mask"])
        return {name: values[:, :length] for name, values in found.items()}

    def tokens_of(self, captions: list[str], spans: Tensor) -> Tensor:
        """`name_tokens` [B, N] of captions, N the tower's length."""
        return name_tokens(self.tokenize(captions, offsets=True)["offsets"], spans)

    def empty(self) -> tuple[Tensor, Tensor]:
        """`tokens` and `mask` [1, N] of the empty caption, where the towers are."""
        return self.empty_tokens, self.empty_mask

    @torch.no_grad()
    def encode(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [B, D], token encodings [B, N, D] and the mask [B, N] of tokenised captions."""
        output = self.towers["text"](tokens, tower_mask(self.towers["text"], mask))
        return output.text_embeds.float(), output.last_hidden_state.float(), mask

    def text(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [B, D], token encodings [B, N, D] and mask [B, N] bool, N the tower's length."""
        tokens, device = self.tokenize(captions, fixed=False), self.empty_tokens.device
        embeds, encodings, mask = self.encode(*(tokens[name].to(device, non_blocking=True) for name in ("tokens", "mask")))
        padding = self.empty_tokens.shape[1] - mask.shape[1]
        return embeds, F.pad(encodings, (0, 0, 0, padding)), F.pad(mask, (0, padding))

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        """Image embeddings [B, D] of images [B, 3, H, W] in [-1, 1]."""
        tower: Any = self.towers["image"]
        size = tower.config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
        images = images * self.scale + self.shift
        return tower(images.contiguous(memory_format=torch.channels_last)).image_embeds.float()


class CachedCLIP(nn.Module):
    """What `unclip embed` keeps of a CLIP: its width, its fingerprint, and the empty caption's embedding and encodings."""

    embeds: Tensor
    encodings: Tensor
    mask: Tensor

    def __init__(self, cache: EmbeddingCache):
        super().__init__()
        self.dim, self.fingerprint = cache.dim, cache.fingerprint
        embeds, encodings, mask = cache.empty()
        self.register_buffer("embeds", embeds, persistent=False)
        self.register_buffer("encodings", encodings, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [1, D], encodings [1, N, D] and mask [1, N] of the empty caption."""
        return self.embeds, self.encodings, self.mask


def replace_dropped(given: Sequence[Tensor], empty: Sequence[Tensor], dropped: Tensor) -> tuple[Tensor, ...]:
    """`given` texts, each tensor [B, ...], with the `empty` one's, each [1, ...], where `dropped` [B].

    `empty` is padded to the tower's length, `given` to the batch's.
    """
    pairs = zip(empty, given, strict=True)
    columns = [(dropped.view(-1, *[1] * (g.ndim - 1)), e[:, : g.shape[1]].to(g), g) for e, g in pairs]
    return tuple(torch.where(*column) for column in columns)


def name_tokens(offsets: Tensor, spans: Tensor) -> Tensor:
    """Which tokens [B, N] spell the first name of a caption (1), the second (-1) or neither (0), int8.

    `offsets` [B, N, 2] are as `FrozenCLIP.tokenize` has them; `spans` [B, 2, 2] have the first character and the one past the
    last of both names, -1 for no name.
    """
    starts, ends = offsets[:, :, None].unbind(-1)  # each [B, N, 1]
    first, second = ((starts < spans[:, None, :, 1]) & (ends > spans[:, None, :, 0])).unbind(-1)
    return torch.where(second, -1, first.to(torch.int8)).to(torch.int8)


def unpadded_length(mask: Tensor) -> int:
    """Tokens [B, N] without the padding that all rows end in: a multiple of `LENGTHS`, at most N. Reads `mask`."""
    longest = int(mask.any(0).nonzero().max()) + 1
    return min(-(-longest // LENGTHS) * LENGTHS, mask.shape[1])


def frozen_clip(model: str, embeddings: str | Path | None) -> FrozenCLIP | CachedCLIP:
    """The CLIP that a stage is trained against, or the cache at `embeddings` in its place.

    Raises ConfigError, with both fingerprints, for the cache of another CLIP, and for a CLIP that a shipped configuration
    would make and has not yet.
    """
    if made_by := maker(model):
        raise ConfigError(f"clip {model} is not there yet: unclip train {made_by}")
    clip = FrozenCLIP.load(model)
    if embeddings is None:
        return clip
    cache = EmbeddingCache(embeddings)
    if cache.fingerprint != clip.fingerprint:
        raise ConfigError(
            f"data.embeddings {embeddings} was made with the CLIP {cache.fingerprint}, but objective.clip {model} is "
            f"{clip.fingerprint}; run `unclip embed` again with it"
        )
    return CachedCLIP(cache)
