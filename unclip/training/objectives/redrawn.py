"""Image embeddings as the decoder will get them: from a trained prior, and off by what that prior is off by."""

# B batch, D embedding dimension

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prior.cache import predictor

from ...data.examples import seeded_noise
from ...diffusion.sampling import denoise, place_timesteps
from ...io.checkpoints import components_folder, load_components
from ...pipelines.base import draws_itself
from ...runtime.config import ConfigError
from .conditioned import check_shares
from .frozen_clip import CachedCLIP, FrozenCLIP


@dataclass
class Redraw:
    """`share` of the image embeddings are drawn anew by `prior` (a training run's or a pipeline's), with its own settings."""

    prior: str
    share: float = 0.5
    steps: int = 10
    guidance: float = 1.5

    def __post_init__(self):
        check_shares(**{"redraw.share": self.share})
        if self.steps < 1:
            raise ConfigError(f"objective.redraw.steps must be at least 1, got {self.steps}")


class RedrawnEmbeddings(nn.Module):
    """True embeddings, noised to a level of the prior's schedule and denoised from there by the caption.

    Each example begins at a step of its own, every one alike often: from the first on it is the prior's answer to the
    caption alone, from the last on nearly the true embedding. Cascades are trained on what the stage before may answer
    (arXiv 2106.15282, section 4), here along the prior's own errors instead of Gaussian ones.
    """

    def __init__(self, settings: Redraw, frozen: FrozenCLIP | CachedCLIP, seed: int):
        super().__init__()
        parts = load_components(components_folder(settings.prior), ("prior", "prior_scheduler"), dtype=torch.float32)
        if draws_itself(parts["prior"]):
            raise ConfigError(f"objective.redraw.prior {settings.prior} is autoregressive: it cannot begin at a true embedding")
        aims_at = getattr(parts["prior"].config, "clip_fingerprint", None)
        if aims_at not in (None, frozen.fingerprint):
            raise ConfigError(
                f"objective.redraw.prior {settings.prior} was trained for the CLIP {aims_at}, "
                f"but objective.clip is {frozen.fingerprint}"
            )
        self.prior = parts["prior"].requires_grad_(False).eval()
        self.scheduler, self.settings, self.seed = parts["prior_scheduler"], settings, seed

    def train(self, mode: bool = True) -> "RedrawnEmbeddings":
        return super().train(False)

    def chosen(self, random: Tensor) -> Tensor:
        """The rows of a batch that are drawn anew, by their random numbers [B, 16]."""
        return (random[:, 10] < self.settings.share).nonzero()[:, 0]

    @torch.no_grad()
    def forward(self, embeds: Tensor, text: tuple[Tensor, ...], empty: tuple[Tensor, ...], batch: dict[str, Any]) -> Tensor:
        """Embeddings [B, D] in place of the true `embeds` [B, D] of a `batch`.

        `text` and `empty` are text embeddings, encodings and mask of the captions and of "".
        """
        steps, prior = self.settings.steps, self.prior
        both = (torch.cat(pair) for pair in zip(empty, text, strict=True))
        with torch.autocast(embeds.device.type, enabled=False):
            answer = predictor(prior, *both)
            clean = (embeds.float() - prior.clip_mean) / prior.clip_std
            noise = seeded_noise(self.seed, batch["index"], clean)
            first = (batch["random"][:, 11] * steps).long()
            timesteps = place_timesteps(self.scheduler, steps).to(clean.device)

            def begin(i: int, t: Tensor, latents: Tensor, *_: object) -> Tensor:
                if i + 1 == steps:
                    return latents
                later = self.scheduler.add_noise(clean, noise, timesteps[i + 1].expand(len(clean)))
                return torch.where((first > i)[:, None], later, latents)

            drawn = denoise(answer, noise, self.scheduler, steps, guidance=self.settings.guidance, on_step=begin)
            return prior.post_process_latents(drawn).to(embeds)
