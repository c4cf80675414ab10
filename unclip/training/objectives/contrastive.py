"""What both contrastive stages, CLIP and the judge, use: preprocessing, augmentation and the bound on the logit scale."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessorPil

MAX_LOGIT_SCALE = 100.0  # "clipped to prevent scaling the logits by more than 100" (CLIP, arXiv 2103.00020, section 2.4)


def image_processor(size: int) -> CLIPImageProcessorPil:
    """The preprocessor that maps images to the tower's [-1, 1] square of `size` pixels."""
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=half, image_std=half
    )


def jitter(pixels: Tensor, random: Tensor, strength: float) -> Tensor:
    """Small rotations, scales and shifts, and for half the images some blur or noise; no flips (left and right are words).

    `pixels` [B, 3, H, W] in [-1, 1]; `random` [B, 16] in [0, 1), each image's own numbers.
    """
    if strength == 0:
        return pixels
    turn, zoom, flatten, right, down, light = ((random[:, :6] * 2 - 1) * strength).unbind(1)  # each [B] around 0
    angle, scale, stretch = 0.2 * turn, 1.05 + 0.12 * zoom, 0.06 * flatten
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos * (1 + stretch), -sin, 0.08 * right, sin, cos * (1 - stretch), 0.08 * down]
    where = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, where, mode="bilinear", padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blend = (random[:, 8] * 1.5 - 0.5).clamp(0, 1)[:, None, None, None] * strength
    moved = moved.lerp(blurred, blend.clamp(0, 1))
    brightness = 1 + 0.08 * light[:, None, None, None]
    return ((moved + 1) * brightness - 1).clamp(-1, 1)
