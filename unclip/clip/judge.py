"""The judge: a second image-text model, for the evaluation only.

Its architecture differs from the shipped CLIP's: depthwise 5x5 convolutions and inverted bottlenecks (ConvNeXt, arXiv
2201.03545, section 2) instead of dense residual blocks and attention, pooling of each image quarter, and a small text tower
over words. Both towers have the outputs of those in `unclip.clip.towers`, so that `CLIP` can hold them.
"""

# B batch, N tokens, C width, D embedding dimension, V vocabulary

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.modeling_clip import CLIPTextModelOutput, CLIPVisionModelOutput

from decoder.blocks import ChannelNorm
from prior.blocks import Block
from prior.storage import Int8Storage

from ..io.checkpoints import components_folder, load_components
from ..io.pixels import uint8_to_float
from .model import CLIP, PARTS
from .towers import mean_over_tokens

SHIPPED = Path(__file__).parents[1] / "pretrained_judge"


class DepthwiseBlock(nn.Module):
    """x + pointwise(gelu(pointwise(norm(depthwise(x))))), scaled by channel weights that are small at initialisation."""

    def __init__(self, channels: int, expansion: int = 2, kernel: int = 5):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = ChannelNorm(channels)
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.contract = nn.Conv2d(expansion * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.contract(F.gelu(self.expand(self.norm(self.depthwise(x)))))


class JudgeImageTower(Int8Storage, ModelMixin):
    """`DepthwiseBlock`s on 4x4 pixel-unshuffled images, with the features of each image quarter pooled separately."""

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        channels: Sequence[int] = (96, 192),
        blocks: Sequence[int] = (1, 6),
        embedding_dim: int = 192,
        dropout: float = 0.0,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        if len(channels) != len(blocks):
            raise ValueError(f"channels {list(channels)} and blocks {list(blocks)} must have one entry per level")
        layers: list[nn.Module] = [nn.Conv2d(48, channels[0], 3, padding=1)]
        width = channels[0]
        for level, (next_width, count) in enumerate(zip(channels, blocks, strict=True)):
            if level:
                layers += [ChannelNorm(width), nn.Conv2d(width, next_width, 3, stride=2, padding=1)]
                width = next_width
            layers += [DepthwiseBlock(width) for _ in range(count)]
        self.body = nn.Sequential(*layers, ChannelNorm(width))
        self.drop = nn.Dropout(dropout)
        self.projection = nn.Linear(5 * width, embedding_dim, bias=False)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> CLIPVisionModelOutput | tuple[Tensor, Tensor]:
        """`pixel_values` [B, 3, S, S] in [-1, 1] -> CLIPVisionModelOutput; `last_hidden_state` [B, N, C] row by row."""
        size = self.config["image_size"]
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must be [B, 3, {size}, {size}], got {list(pixel_values.shape)}")
        features = self.body(F.pixel_unshuffle(pixel_values, 4))  # [B, C, h, w]
        quarters = F.adaptive_avg_pool2d(features, 2).flatten(1)  # [B, 4C]
        pooled = self.drop(torch.cat([quarters, features.amax((2, 3))], 1))  # [B, 5C]
        embeds = F.normalize(self.projection(pooled), dim=-1)  # [B, D]
        tokens = features.flatten(2).transpose(1, 2)  # [B, N, C]
        if not return_dict:
            return embeds, tokens
        return CLIPVisionModelOutput(image_embeds=embeds, last_hidden_state=tokens)


class JudgeTextTower(Int8Storage, ModelMixin):
    """A small pre-norm Transformer over words, mean-pooled and projected to a unit vector."""

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
        self,
        vocab_size: int,
        width: int = 128,
        layers: int = 2,
        head_dim: int = 64,
        context_length: int = 24,
        embedding_dim: int = 192,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(context_length, width) * 0.1)
        nn.init.normal_(self.words.weight, std=0.5)
        self.stack = nn.ModuleList(Block(width, head_dim, dropout=0.0) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embedding_dim, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ) -> CLIPTextModelOutput | tuple[Tensor, Tensor]:
        """`input_ids` [B, N] int64, `attention_mask` [B, N] (1 = a word) -> CLIPTextModelOutput."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.words(input_ids) + self.position[: input_ids.shape[1]]  # [B, N, C]
        attend = attention_mask.bool()[:, None, None, :]  # [B, 1, 1, N]
        for block in self.stack:
            hidden = block(hidden, attend)
        hidden = self.norm(hidden)
        embeds = F.normalize(self.projection(mean_over_tokens(hidden, attention_mask)), dim=-1)  # [B, D]
        if not return_dict:
            return embeds, hidden
        return CLIPTextModelOutput(text_embeds=embeds, last_hidden_state=hidden)


def word_tokenizer(texts: Iterable[str], context_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of `texts`, in lower case; 0 is padding, 1 an unknown word."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    lower = normalizers.Lowercase()
    found = {word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))}
    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *sorted(found)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=context_length
    )


class Judge(CLIP):
    """Two towers that score images against captions, and image features for distances between sets."""

    @classmethod
    def load(cls, judge: str | Path) -> Self:
        """A shipped judge ("dev" or "test"), a training run, or a folder of components; in float32.

        Raises ValueError, with the command that trains one, when there is none.
        """
        folder = SHIPPED / judge if str(judge) in ("dev", "test") else components_folder(judge)
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"no judge at {folder}; train one with `python train.py configs/emoji/judge.yaml` and pass --judge RUN"
            )
        found = cls(**load_components(folder, PARTS, dtype=torch.float32))
        if isinstance(found.image_encoder, ModelMixin):
            found.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # a wrapper without the types of nn.Module.to
        return found

    @torch.no_grad()
    def see(self, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
        """Unit embeddings [N, D] and mean hidden features [N, C] of images uint8 [N, 3, H, W]."""
        embeds, features = [], []
        for chunk in images.split(batch):
            pixels = self.preprocess(uint8_to_float(chunk)).contiguous(memory_format=torch.channels_last)
            output = self.image_encoder(pixels.to(self.image_encoder.device))
            embeds.append(output.image_embeds.float().cpu())
            features.append(output.last_hidden_state.float().mean(1).cpu())
        return torch.cat(embeds), torch.cat(features)

    @torch.no_grad()
    def read(self, captions: Sequence[str], batch: int = 1024) -> Tensor:
        """Unit embeddings [N, D] of captions."""
        chunks = [captions[n : n + batch] for n in range(0, len(captions), batch)]
        rows = []
        for chunk in chunks:
            tokens = self.tokenize(chunk, padding=True).to(self.text_encoder.device)
            rows.append(self.text_encoder(tokens.input_ids, tokens.attention_mask).text_embeds.float().cpu())
        return torch.cat(rows)
