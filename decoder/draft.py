"""The draft head: a low-resolution image by regression from a CLIP image embedding, which the decoder refines."""

# B batch, D embedding dimension, W width, R side of the draft in pixels, C channels, H height, T time-embedding width

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
    noise. The output is zero, mid-gray, at initialisation. With `opacity` there is a fourth channel, the object's opacity
    in [0, 1] on a white background, from a linear layer at half the resolution.
    """

    mean: Tensor  # [D]
    std: Tensor  # [D]

    def __init__(
        self,
        embedding_dim: int,
        size: int = 32,
        width: int = 1280,
        layers: int = 4,
        styles: int = 0,
        opacity: bool = False,
    ):
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
        self.opacity_out = self.opacity_convs = None
        if opacity:
            self.opacity_out = zero_module(nn.Linear(width, (size // 2) ** 2))
            first, last = nn.Conv2d(4, CONV_CHANNELS, 3, padding=1), nn.Conv2d(CONV_CHANNELS, 1, 3, padding=1)
            self.opacity_convs = nn.Sequential(first, nn.SiLU(), zero_module(last))

    def forward(self, image_embeddings: Tensor, style: Tensor | None = None) -> Tensor:
        """-> [B, 3, R, R], with `opacity` [B, 4, R, R].

        `image_embeddings` [B, D]; `style` int64 [B], the number of styles where no style is named (None: in no row).
        """
        x = self.proj_in(((image_embeddings - self.mean) / self.std).to(self.proj_in.weight.dtype))  # [B, W]
        if self.style_embedding is not None:
            unnamed = self.style_embedding.num_embeddings - 1
            style = torch.full((len(x),), unnamed, device=x.device) if style is None else style
            x = x + self.style_embedding(style)
        for block in self.blocks:
            x = block(x)
        features = F.gelu(self.norm_out(x))
        draft = self.proj_out(features).unflatten(1, (3, self.size, self.size))  # [B, 3, R, R]
        h = draft
        for number, conv in enumerate(self.convs):
            h = conv(F.silu(h) if number else h)
        draft = draft + h
        if self.opacity_out is None or self.opacity_convs is None:
            return draft
        opacity = self.opacity_out(features).unflatten(1, (1, self.size // 2, self.size // 2))
        opacity = F.interpolate(opacity, scale_factor=2, mode="bilinear", align_corners=False)  # [B, 1, R, R]
        return torch.cat([draft, opacity + self.opacity_convs(torch.cat([draft, opacity], 1))], 1)


class ResidualMLP(nn.Module):
    """x + linear(gelu(linear(norm(x)))), the identity at initialisation."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj_in = nn.Linear(width, width)
        self.proj_out = zero_module(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(F.gelu(self.proj_in(self.norm(x))))


class DraftSkip(nn.Module):
    """Connects sample and draft with the decoder's output (v prediction).

    Of x0 = draft + error, the error being Gaussian with variance s, the noised sample gives the posterior mean in closed form,
    and with it v = (alpha x_t - x0) / sigma (arXiv 2202.00512, appendix D) as

        v_draft = sigma (alpha (1 - s) x_t - draft) / (s alpha^2 + sigma^2).

    The output is prediction + gate (v_draft - prediction) + residual. The gate of a pixel is a linear function of the time
    embedding, which holds noise level and condition, plus a convolution of the last features, which can close it where the
    draft is wrong, as for scenes; the residual is another. All are zero at the start. It is the role of c_skip in EDM's
    preconditioning (arXiv 2206.00364, equation 7), with an image where EDM has zero.

    `alphas_cumprod` [N] is the training schedule's, set before training.
    """

    def __init__(self, channels: int, time_embed_dim: int, timesteps: int = 1000, variance: float = 0.015):
        super().__init__()
        self.variance = variance
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", torch.zeros(timesteps))
        self.gate = nn.Linear(time_embed_dim, 1)
        self.conv = nn.Conv2d(channels, 16, 3, padding=1)  # residual and gate of 2x2 pixels
        zero_module(self)

    def forward(
        self, prediction: Tensor, sample: Tensor, draft: Tensor, timestep: Tensor, emb: Tensor, features: Tensor
    ) -> Tensor:
        """The prediction [B, 3, H, H]; unchanged for examples without a draft, which are all zeros.

        Args:
            prediction: the network's own [B, 3, H, H].
            sample: noised images [B, 3, H, H].
            draft: [B, 3, H, H], about in [-1, 1].
            timestep: [1 or B] in [0, N).
            emb: time embeddings after their activation [1 or B, T].
            features: what the network's last convolution takes [B, C, H/2, H/2].
        """
        steps = timestep.round().long().clamp(0, len(self.alphas_cumprod) - 1)
        signal = self.alphas_cumprod[steps][:, None, None, None]  # [1 or B, 1, 1, 1]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        v_draft = sigma * (alpha * (1 - self.variance) * sample - draft) / (self.variance * signal + 1 - signal)
        residual, gate = F.pixel_shuffle(self.conv(features), 2).split((3, 1), 1)
        gate = gate + self.gate(emb)[..., None, None]  # [B, 1, H, H]
        change = gate * (v_draft.to(prediction.dtype) - prediction) + residual
        has_draft = (draft != 0).flatten(1).any(1)[:, None, None, None]
        return prediction + change * has_draft
