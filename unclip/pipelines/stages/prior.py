"""The prior: text embeddings to CLIP image embeddings (paper, section 2.2)."""

# B images, K candidates per image, D embedding dimension

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prior.cache import predictor

from ...diffusion.sampling import DenoisingOptions
from ...runtime.memory import onloaded
from ..call import Call
from ..components import is_autoregressive
from .text import TextCondition

if TYPE_CHECKING:
    from ..base import UnCLIPBase


def sample_prior(pipe: "UnCLIPBase", text: TextCondition, call: Call, latents: Tensor | None = None) -> Tensor:
    """CLIP image embeddings [B, D]: for each image the candidate that is nearest to its text.

    `latents` [B, D] are the starting noise; then there is one candidate per image.
    """
    candidates = int(call.settings.prior_candidates) if latents is None else 1
    generator = call.generator
    if isinstance(generator, list):
        generator = [g for g in generator for _ in range(candidates)]
    call = replace(call, generator=generator)
    sample = _sample_tokens if is_autoregressive(pipe.prior) else _sample_diffusion
    with pipe._run_stage("prior", "prior"):
        return nearest_to_text(sample(pipe, text, call, candidates, latents), text, candidates)


def _sample_diffusion(pipe: "UnCLIPBase", text: TextCondition, call: Call, candidates: int, latents: Tensor | None) -> Tensor:
    """Sample image embeddings [B * K, D] from a diffusion prior."""
    prior, guidance = pipe.prior, call.settings.guidance_scale("prior")
    embeds, encodings, mask = _condition_inputs(pipe, text, guidance)
    style = _style(pipe, text, guidance != 1)
    predict_embedding = predictor(prior, embeds, encodings, mask, candidates, style)
    start = pipe._starting_noise((len(text) * candidates, prior.config["embedding_dim"]), prior, call.generator, latents)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return predict_embedding(x.to(prior.dtype), t).to(x.dtype)

    steps = call.settings.prior_num_inference_steps
    embeddings = pipe._denoise(predict, start, pipe.prior_scheduler, steps, call, DenoisingOptions(guidance=guidance))
    with onloaded(prior):
        return prior.post_process_latents(embeddings)


def _sample_tokens(pipe: "UnCLIPBase", text: TextCondition, call: Call, candidates: int, latents: Tensor | None) -> Tensor:
    """Sample image embeddings [B * K, D] from an autoregressive prior; a callback gets its tokens, for both tensor names.

    Raises ValueError for `latents`: it starts without noise.
    """
    if latents is not None:
        raise ValueError("prior_latents: an autoregressive prior starts from no noise")
    guidance = call.settings.guidance_scale("prior")
    conditions = [v.repeat_interleave(candidates, 0) for v in _condition_inputs(pipe, text, guidance)]
    with onloaded(pipe.prior):
        return pipe.prior.draw(
            *conditions,
            guidance,
            call.generator,
            progress=pipe._bar("prior"),
            on_token=lambda number, tokens: pipe._on_step(number, torch.tensor(number), tokens, lambda: tokens),
            stopped=lambda: pipe.interrupt,
        )


def _condition_inputs(pipe: "UnCLIPBase", text: TextCondition, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Text embeddings, encodings and mask in the prior's dtype, under guidance with the unconditional half first."""
    embeds, encodings, mask = text.inputs(guidance != 1)
    return embeds.to(pipe.prior.dtype), encodings.to(pipe.prior.dtype), mask


def _style(pipe: "UnCLIPBase", text: TextCondition, is_guided: bool) -> Tensor | None:
    """The styles [B], under guidance [2B] with "not named" first; None for a prior without styles."""
    if text.style is None or not pipe.prior.config.get("styles"):
        return None
    unnamed = torch.full_like(text.style, len(pipe.styles))
    return torch.cat([unnamed, text.style]) if is_guided else text.style


def nearest_to_text(embeds: Tensor, text: TextCondition, candidates: int) -> Tensor:
    """Of each image's candidates [B * K, D] the one nearest to its text: [B, D] (paper, section 2.2)."""
    if candidates == 1:
        return embeds
    embeds = embeds.unflatten(0, (-1, candidates))  # [B, K, D]
    best = (embeds * text.embeds[:, None].to(embeds.dtype)).sum(-1).argmax(1)  # [B]
    return embeds[torch.arange(len(embeds), device=embeds.device), best]


def null_embedding(pipe: "UnCLIPBase", text: TextCondition) -> Tensor:
    """The decoder's learned embedding for "no image embedding", for each image: [B, D]."""
    with pipe._run_stage("prior", "text_proj"), onloaded(pipe.text_proj):
        null = pipe.text_proj.learned_classifier_free_guidance_embeddings
        return null.detach().to(pipe._execution_device).expand(len(text), -1).clone()
