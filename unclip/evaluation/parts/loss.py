"""The decoder's loss by timestep, on training data and on held-out data."""

# N images, T timesteps, K candidates, P values of an image

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...data.render import Layer
from ...diffusion.predictions import predict_x0
from ...io.pixels import normalize
from .. import prompts as prompt_sets
from ..context import EvaluationContext
from ..metrics import mean
from ..poses import random_place, render_layers
from ..prompts import Prompt
from ..report import Part, Plot, Table

TIMESTEPS = (100, 300, 500, 700, 800, 900, 980)
NOISY = TIMESTEPS[2:]  # where `CANDIDATES` are as good as all sizes and places; with less noise they are too few
SCENES = 256
KNOWN = 64  # icons for the denoiser that knows them
CANDIDATES = 512  # sizes and places that this denoiser averages over
BATCH = 32


def measure(context: EvaluationContext) -> Part:
    """Mean squared error of v at fixed timesteps and noise, from true embeddings and captions, without guidance.

    Of training icons in their pose; of held-out scenes; and of a denoiser that knows an icon but not its size and place: a
    bound for every decoder on icons of random size and place.
    """
    singles = context.single_concepts
    scenes = prompt_sets.scenes(context.icons, context.split, context.limited_count(SCENES))
    errors = {
        "training icons": decoder_errors(context, singles.prompts, singles.styles, singles.true_embeddings, singles.real),
        "held-out scenes": decoder_errors(
            context, scenes, [p.truth.style for p in scenes], context.true_embeddings(scenes), context.real_renders(scenes)
        ),
        "icon known": _known_icon_errors(context),
    }
    results = {
        name: {str(t): mean(column) for t, column in zip(TIMESTEPS[-found.shape[1] :], found.T, strict=True)}
        for name, found in errors.items()
    }
    rows = [[name, *(found.get(str(t)) for t in TIMESTEPS)] for name, found in results.items()]
    note = (
        f"{len(singles.prompts)} training icons in their pose and {len(scenes)} held-out scenes, without guidance; an image's "
        f"noise is the same at every timestep. Icon known: the posterior mean over {CANDIDATES} sizes and places of the icon."
    )
    lines = {name: [(float(t), estimate) for t, estimate in found.items()] for name, found in results.items()}
    table = Table("Loss by timestep (mean squared error of v)", ["", *map(str, TIMESTEPS)], rows, note)
    return Part("loss", results, [table, Plot("Loss by timestep", "timestep", "mean squared error of v", lines)])


@torch.no_grad()
def decoder_errors(
    context: EvaluationContext, prompts: list[Prompt], styles: list[str], embeds: Tensor, images: Tensor
) -> Tensor:
    """Mean squared errors of v [N, T] of the decoder, conditioned as the pipeline conditions it.

    Args:
        styles: the images' styles, for decoders that know some.
        embeds: image embeddings [N, D].
        images: uint8 [N, 3, S, S], to which noise is added; that of image n has seed `context.sample_store.seed` + n.
    """
    scheduler, device = context.pipe.decoder_scheduler, context.pipe._execution_device
    clean = normalize(images.to(device))
    noise = torch.stack([_noise(clean[0].shape, context.sample_store.seed + n) for n in range(len(clean))]).to(device)
    found = []
    for start in range(0, len(prompts), BATCH):
        some = slice(start, start + BATCH)
        predict = context.pipe.decoder_prediction([p.text for p in prompts[some]], embeds[some], styles[some])

        def denoised(noised: Tensor, t: int) -> Tensor:
            prediction = predict(noised, torch.tensor(t, device=device))[:, : noised.shape[1]].float()  # noqa: B023
            return predict_x0(scheduler, prediction, noised, torch.full((len(noised),), t, device=device))

        found.append(velocity_errors(scheduler.alphas_cumprod, denoised, clean[some], noise[some]))
    return torch.cat(found).cpu()


def velocity_errors(
    alpha_bar: Tensor,
    denoised: Callable[[Tensor, int], Tensor],
    clean: Tensor,
    noise: Tensor,
    timesteps: Sequence[int] = TIMESTEPS,
) -> Tensor:
    """Mean squared errors of v [N, T] of `denoised`, a function of noised images and a timestep that predicts x0.

    v = alpha eps - sigma x0 = (alpha x_t - x0) / sigma (arXiv 2202.00512, appendix D), so that an error of x0 is sigma times
    one of v, whatever a network predicts.
    """
    found = []
    for t in timesteps:
        signal = alpha_bar[t].to(clean)
        noised = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        found.append((denoised(noised, t) - clean).square().flatten(1).mean(1) / (1 - signal))
    return torch.stack(found, 1)


def _known_icon_errors(context: EvaluationContext) -> Tensor:
    """Mean squared errors of v, at the timesteps `NOISY`, of a denoiser that knows the icon, not its size and place."""
    rng, rows = (
        np.random.default_rng([context.sample_store.seed, 9]),
        context.single_concepts.rows[: context.limited_count(KNOWN)],
    )
    alpha_bar = context.pipe.decoder_scheduler.alphas_cumprod.cpu()
    places = [random_place(rng) for _ in range(CANDIDATES)]
    found = []
    for n, (row, image) in enumerate(zip(rows, context.single_concepts.jittered, strict=False)):
        known = normalize(render_layers(context.icons, [Layer(row, *place) for place in places]))
        clean = normalize(image[None])
        noise = _noise(clean[0].shape, context.sample_store.seed + n)[None]
        found.append(
            velocity_errors(alpha_bar, lambda x, t: posterior_mean(x, known, alpha_bar[t]), clean, noise, NOISY)  # noqa: B023
        )
    return torch.cat(found)


def posterior_mean(noised: Tensor, candidates: Tensor, alpha_bar: Tensor) -> Tensor:
    """The posterior mean of x0 [N, ...] for a uniform prior over `candidates` [K, ...]."""
    signal, noise = alpha_bar.sqrt(), 1 - alpha_bar
    x, known = noised.flatten(1), candidates.flatten(1)  # [N, P], [K, P]
    squares = known.square().sum(1)
    weights = ((signal * x @ known.T - alpha_bar * squares / 2) / noise).softmax(1)  # |x|^2 is the same for all
    return (weights @ known).view_as(noised)


def _noise(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
