"""The draft head: a low-resolution image by regression from a CLIP image embedding, which the decoder refines."""

# B batch, D embedding dimension, W width, R side of the draft in pixels

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.blocks import zero_module

CONV_CHANNELS = 24


class DraftHead(nn.Module):
    """Residual MLP from an image embedding [B, D] and a style to an RGB image [B, 3, R, R], about in [-1, 1].

    The content of an embedding is cheaper to learn by regression than by denoising; the decoder gets the draft as
    further input channels, denoises it and adds detail. Embeddings are standardised per dimension by
    `mean` and `std`, which are set from data before training. Convolutions after the last linear layer remove its pixel
    noise. The output is zero, mid-gray, at initialisation.
    """

    mean: Tensor  # [D]
    std: Tensor  # [D]

    def __init__(self, embedding_dim: int, size: int = 32, width: int = 1280, layers: int = 4, styles: int = 0):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("std", torch.full((embedding_dim,), embedding_dim**-0.5))
        self.proj_in = nn.Linear(embedding_dim, width)
        self.style_embedding = nn.Embedding(styles + 1, width) if styles else None
        self.blocks = nn.ModuleList(ResidualMLP(width) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, 3 * size * size)
        channels = (3, CONV_CHANNELS, CONV_CHANNELS, 3)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, channels[1:], strict=False))
        zeroed: Sequence[nn.Module | None] = (self.proj_out, self.convs[-1], self.style_embedding)
        for layer in zeroed:
            if layer is not None:
                zero_module(layer)

    def forward(self, image_embeddings: Tensor, style: Tensor | None = None) -> Tensor:
        """`image_embeddings` [B, D]; `style` int64 [B], the number of styles where no style is named (None: in no row)."""
        x = self.proj_in(((image_embeddings - self.mean) / self.std).to(self.proj_in.weight.dtype))  # [B, W]
        if self.style_embedding is not None:
            unnamed = self.style_embedding.num_embeddings - 1
            style = torch.full((len(x),), unnamed, device=x.device) if style is None else style
            x = x + self.style_embedding(style)
        for block in self.blocks:
            x = block(x)
        draft = self.proj_out(F.gelu(self.norm_out(x))).unflatten(1, (3, self.size, self.size))  # [B, 3, R, R]
        h = draft
        for number, conv in enumerate(self.convs):
            h = conv(F.silu(h) if number else h)
        return draft + h


class ResidualMLP(nn.Module):
    """x + linear(gelu(linear(norm(x)))), the identity at initialisation."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj_in = nn.Linear(width, width)
        self.proj_out = zero_module(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(F.gelu(self.proj_in(self.norm(x))))
