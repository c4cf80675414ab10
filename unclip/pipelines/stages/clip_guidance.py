"""CLIP guidance of the decoder (GLIDE, arXiv 2112.10741, section 2.4)."""

# B images, C channels, D embedding dimension, H height, W width

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clip.model import CLIP
from ...diffusion.guidance import apply_guidance
from ...diffusion.predictions import offset_x0, predict_x0
from ...diffusion.sampling import Predict, Scheduler
from ...io.pixels import denormalize


def clip_guided(
    predict: Predict, clip: CLIP, text_embeds: Tensor, scheduler: Scheduler, guidance: float, strength: float
) -> Predict:
    """`predict` with x0 moved along the gradient of the cosine between its CLIP embedding and text embeddings [B, D].

    The gradient goes through the decoder's estimate of x0 and is scaled to unit root mean square; `strength` is the step
    size in units of the remaining noise. `guidance` is the classifier-free guidance scale.
    """
    wanted = F.normalize(text_embeds.float(), dim=-1)  # [B, D]

    def predict_guided(x: Tensor, t: Tensor) -> Tensor:
        rows, channels = len(wanted), x.shape[1]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            prediction = predict(x, t)
            estimate = prediction[:, :channels]
            if len(x) > rows:
                estimate = apply_guidance(estimate, channels, guidance)
            clean = predict_x0(scheduler, estimate, x[-rows:], t.reshape(1).expand(rows))
            pixels = clip.preprocess(denormalize(clean.float()))
            embeds = clip.image_encoder(pixels.to(clip.image_encoder.dtype)).image_embeds.float()
            gradient = torch.autograd.grad(F.cosine_similarity(embeds, wanted).sum(), x)[0]
        gradient = gradient.unflatten(0, (-1, rows)).sum(0)  # both halves of a guided batch are one image
        gradient = gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        remaining = (1 - scheduler.alphas_cumprod[t.long()]).sqrt().to(gradient)
        offset = (strength * remaining * gradient).repeat(len(x) // rows, 1, 1, 1)
        prediction = prediction.detach()
        moved = offset_x0(scheduler, prediction[:, :channels], offset, t.reshape(1).expand(len(x)))
        return torch.cat([moved, prediction[:, channels:]], 1)

    return predict_guided
