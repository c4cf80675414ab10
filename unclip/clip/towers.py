"""CLIP's text tower and image tower.

Their outputs are those of transformers' `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection` (`text_embeds`,
`last_hidden_state`, `image_embeds`), so that a pipeline accepts either.
"""

# B batch, N tokens, C width, D embedding dimension

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPTextModelWithProjection, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPTextModelOutput, CLIPVisionModelOutput

from decoder.blocks import ChannelNorm, ResBlock
from prior.blocks import Attention, Checkpointed
from prior.storage import Int8Storage

Tower = ModelMixin | PreTrainedModel  # of this package, or of transformers


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean [B, C] of `hidden` [B, N, C] over the tokens where `mask` [B, N] is 1."""
    weight = mask.to(hidden.dtype)[..., None]  # [B, N, 1]
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


class TextTower(Int8Storage, ModelMixin):
    """A BERT encoder, mean-pooled over its tokens and projected to a unit vector.

    The projection is the identity at initialisation when `width == embedding_dim`, so that a tower initialised with a sentence
    encoder has its similarities.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
        self,
        vocab_size: int = 30522,
        width: int = 384,
        layers: int = 6,
        heads: int = 12,
        feed_forward: int = 1536,
        context_length: int = 32,
        embedding_dim: int = 384,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=feed_forward,
                max_position_embeddings=context_length,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
        self.projection = nn.Linear(width, embedding_dim, bias=False)
        if width == embedding_dim:
            nn.init.eye_(self.projection.weight)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ) -> CLIPTextModelOutput | tuple[Tensor, Tensor]:
        """`input_ids` [B, N] int64, `attention_mask` [B, N] (1 = a token) -> CLIPTextModelOutput."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.long()
        if self.bert.config._attn_implementation == "sdpa":
            mask = mask.bool()[:, None, None]  # [B, 1, 1, N]; for [B, N] BERT would read on the host whether all is true
        hidden = self.bert(input_ids=input_ids, attention_mask=mask).last_hidden_state  # [B, N, C]
        embeds = F.normalize(self.projection(mean_over_tokens(hidden, attention_mask)), dim=-1)  # [B, D]
        if not return_dict:
            return embeds, hidden
        return CLIPTextModelOutput(text_embeds=embeds, last_hidden_state=hidden)


def tower_mask(tower: nn.Module, mask: Tensor) -> Tensor:
    """A mask [B, N] of texts (true at a token) in the form that a text tower does not read on the host."""
    if isinstance(tower, CLIPTextModelWithProjection) and tower.config._attn_implementation == "sdpa":
        return mask.bool()[:, None, None] & torch.ones(*mask.shape[1:] * 2, dtype=torch.bool, device=mask.device).tril()
    return mask


class ImageTower(Checkpointed, Int8Storage, ModelMixin):
    """A residual convolutional network on 2x2 pixel-unshuffled images, pooled by one learned query."""

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
        self,
        image_size: int = 64,
        channels: Sequence[int] = (48, 128, 256),
        blocks: Sequence[int] = (1, 2, 3),
        head_dim: int = 64,
        embedding_dim: int = 384,
        dropout: float = 0.0,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        if len(channels) != len(blocks):
            raise ValueError(f"channels {list(channels)} and blocks {list(blocks)} must have one entry per level")
        layers: list[nn.Module] = [nn.Conv2d(12, channels[0], 3, padding=1)]
        width = channels[0]
        for level, (next_width, count) in enumerate(zip(channels, blocks, strict=True)):
            if level:
                layers.append(nn.Conv2d(width, next_width, 3, stride=2, padding=1))
                width = next_width
            layers += [ResBlock(width, width, dropout=dropout) for _ in range(count)]
        self.body = nn.Sequential(*layers, ChannelNorm(width))
        side = image_size // 2 ** len(channels)
        self.position = nn.Parameter(torch.randn(side * side, width) * 0.02)
        self.mix = Attention(width, head_dim)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(2 * width, embedding_dim, bias=False)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> CLIPVisionModelOutput | tuple[Tensor, Tensor]:
        """`pixel_values` [B, 3, S, S] in [-1, 1] with S the tower's `image_size` -> CLIPVisionModelOutput."""
        size = self.config["image_size"]
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must be [B, 3, {size}, {size}], got {list(pixel_values.shape)}")
        features = F.pixel_unshuffle(pixel_values, 2)
        for layer in self.body:
            features = self.run(layer, features)  # [B, C, h, w]
        tokens = features.flatten(2).transpose(1, 2) + self.position.to(features.dtype)  # [B, N, C]
        tokens = self.norm(tokens + self.mix(tokens))
        weights = (tokens @ self.query.to(tokens.dtype)).softmax(-1)  # [B, N]
        pooled = torch.cat([(weights[..., None] * tokens).sum(1), tokens.amax(1)], -1)  # [B, 2C]
        embeds = F.normalize(self.projection(pooled), dim=-1)  # [B, D]
        if not return_dict:
            return embeds, tokens
        return CLIPVisionModelOutput(image_embeds=embeds, last_hidden_state=tokens)
