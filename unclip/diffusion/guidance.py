"""Classifier-free guidance (arXiv 2207.12598, equation 6)."""

# B batch, C channels of a sample

import torch
from torch import Tensor


def apply_guidance(prediction: Tensor, channels: int, guidance_scale: float) -> Tensor:
    """uncond + w (cond - uncond) of a prediction [2B, C or 2C, ...] whose unconditional half comes first: [B, C or 2C, ...].

    Channels past `channels` predict a variance, which is taken from the conditional half.
    """
    unconditional, conditional = prediction.chunk(2)
    mean = unconditional[:, :channels] + guidance_scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([mean, conditional[:, channels:]], 1)
