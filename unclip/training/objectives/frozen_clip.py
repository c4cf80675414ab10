"""The CLIP that prior and decoder are trained against."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...clip.model import CLIP
from ...data.embeddings import EmbeddingCache
from ...io.checkpoints import components_folder
from ...networks import embedding_dim
from ...runtime.config import ConfigError, maker


class FrozenCLIP(nn.Module):
    """The CLIP that a stage is trained against, without gradients."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.towers = nn.ModuleDict({"text": clip.text_encoder, "image": clip.image_encoder}).requires_grad_(False).eval()
        self.clip = clip
        self.dim = embedding_dim(clip.text_encoder)
        # from pictures in [-1, 1] to what the image tower was trained on
        scale = 0.5 / torch.tensor(clip.feature_extractor.image_std).view(1, 3, 1, 1)
        shift = 2 * scale * (0.5 - torch.tensor(clip.feature_extractor.image_mean).view(1, 3, 1, 1))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.fingerprint = clip.fingerprint

    @classmethod
    def load(cls, model: str) -> "FrozenCLIP":
        """The CLIP of a training run or of a pipeline, in fp32 and channels_last."""
        clip = CLIP.from_pretrained(components_folder(model), dtype=torch.float32)
        clip.image_encoder.to(memory_format=torch.channels_last)
        return cls(clip)

    def train(self, mode: bool = True) -> "FrozenCLIP":
        return super().train(False)

    @torch.no_grad()
    def text(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [B, D], token encodings [B, N, D] and mask [B, N] bool."""
        tokens = self.clip.tokenize(captions).to(self.towers["text"].device)
        longest = int(tokens.attention_mask.sum(1).max())
        ids, mask = tokens.input_ids[:, :longest], tokens.attention_mask[:, :longest]
        output = self.towers["text"](ids, mask)
        encodings = F.pad(output.last_hidden_state, (0, 0, 0, tokens.input_ids.shape[1] - longest))
        return output.text_embeds.float(), encodings.float(), tokens.attention_mask.bool()

    def tokens_of(self, captions: list[str], spans: Tensor) -> Tensor:
        """Which tokens spell the first span of each caption (1), the second (-1) or neither (0): [B, N] int8.

        `spans` [B, 2, 2] has the first character and the one past the last, -1 for no span.
        """
        encoded = self.clip.tokenize(captions)
        found = torch.zeros(encoded.input_ids.shape, dtype=torch.int8)
        for row, pair in enumerate(spans.tolist()):
            for sign, (start, end) in zip((1, -1), pair, strict=True):
                for at in range(start, end):
                    token = encoded.char_to_token(row, at)
                    if token is not None:  # a space, or past the tokenizer's length
                        found[row, token] = sign
        return found

    @torch.no_grad()
    def image(self, pictures: Tensor) -> Tensor:
        """Image embeddings [B, D] of pictures [B, 3, H, W] in [-1, 1]."""
        size = self.towers["image"].config.image_size
        if pictures.shape[-1] != size:
            pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True, align_corners=False)
        pictures = pictures * self.scale + self.shift
        return self.towers["image"](pictures.contiguous(memory_format=torch.channels_last)).image_embeds.float()


class CachedCLIP(nn.Module):
    """What `unclip embed` kept of a CLIP: its width, its fingerprint, and what it says of the empty text."""

    def __init__(self, cache: EmbeddingCache):
        super().__init__()
        self.dim, self.fingerprint = cache.dim, cache.fingerprint
        embeds, encodings, mask = cache.empty()
        self.register_buffer("embeds", embeds, persistent=False)
        self.register_buffer("encodings", encodings, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def text(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """As `FrozenCLIP.text`, for empty captions only."""
        if any(captions):
            raise ValueError(f"an embedding cache cannot encode {next(filter(None, captions))!r}")
        return tuple(t.expand(len(captions), *t.shape[1:]) for t in (self.embeds, self.encodings, self.mask))


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
