"""Noise schedules, and the training losses' weights and timesteps, of all diffusion stages."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from ..runtime.config import ConfigError, nearest
from .predictions import PREDICTIONS, predict_x0
from .scheduler import UnCLIPScheduler

WITHOUT_DOUBLES = ("mps", "xpu")  # kinds of devices


def logit_normal_timesteps(random: Tensor, count: int, mean: float = 0.2, std: float = 1.2) -> Tensor:
    """Timesteps [B] of a schedule with `count` steps, their logit normally distributed; `random` [B] uniform in [0, 1).

    More of the samples are at intermediate levels, where an image's shapes are determined (arXiv 2403.03206, section 3.1).
    """
    level = torch.sigmoid(mean + std * torch.special.ndtri(_double(random).clamp(1e-6, 1 - 1e-6)))
    return (level * count).long().clamp(0, count - 1).to(random.device)


def uniform_timesteps(random: Tensor, count: int) -> Tensor:
    """Timesteps [B], uniform over a schedule with `count` steps; `random` [B] uniform in [0, 1)."""
    return (_double(random) * count).long().clamp(0, count - 1).to(random.device)


def _double(values: Tensor) -> Tensor:
    """In float64; on the CPU where the device has no float64."""
    return (values.cpu() if values.device.type in WITHOUT_DOUBLES else values).double()


def snr_weight(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights [B] of the squared error of what the network predicts (arXiv 2303.09556, section 3.4).

    For every prediction type, the error of x0 has the weight min(SNR, gamma).
    """
    alpha_bar = _double(scheduler.alphas_cumprod)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=gamma)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        weight = weight / snr
    elif kind == "v_prediction":
        weight = weight / (snr + 1)
    return weight.float().to(timesteps.device)[timesteps]


def variational_bound(
    scheduler: DDPMScheduler, prediction: Tensor, share: Tensor, clean: Tensor, noised: Tensor, timesteps: Tensor
) -> Tensor:
    """The bound's term at each timestep, in bits per dimension [B] (arXiv 2006.11239, equation 5; L_0 is equation 13).

    `prediction` [B, C, ...] gives the mean and `share` [B, C, ...] the variance, interpolated in log space from the
    posterior's at -1 to beta at 1 (arXiv 2102.09672, equation 15). `clean` is in [-1, 1] in steps of 2/255.
    """

    def at(table: Tensor) -> Tensor:
        return table.float().to(noised.device)[timesteps].view(-1, *[1] * (noised.ndim - 1))

    alphas, betas = _double(scheduler.alphas), _double(scheduler.betas)
    alpha_bar = alphas.cumprod(0)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    posterior = betas * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]  # the first is 0, and has no logarithm
    of_clean, of_noised = before.sqrt() * betas / (1 - alpha_bar), alphas.sqrt() * (1 - before) / (1 - alpha_bar)
    smallest, largest = at(posterior.log()), at(betas.log())
    log_variance = smallest + (share + 1) / 2 * (largest - smallest)
    guess = predict_x0(scheduler, prediction, noised, timesteps)
    apart = at(of_clean) * (clean - guess)  # the difference of the means, in which the noised sample's part cancels
    nats = 0.5 * (log_variance - smallest - 1 + (smallest - log_variance).exp() + apart.square() * (-log_variance).exp())
    mean = at(of_clean) * guess + at(of_noised) * noised
    nats, first = nats.flatten(1).mean(1), -log_discrete_normal(clean, mean, log_variance).flatten(1).mean(1)
    return torch.where(timesteps == 0, first, nats) / math.log(2)


def log_discrete_normal(images: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probabilities of 8-bit pixels in [-1, 1] under a normal that is cut into 256 levels (arXiv 2006.11239, eq. 13)."""
    scale = (-0.5 * log_variance).exp()
    above = torch.special.ndtr((images + 1 / 255 - mean) * scale)
    below = torch.special.ndtr((images - 1 / 255 - mean) * scale)
    above = torch.where(images > 0.999, torch.ones_like(above), above)
    below = torch.where(images < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp_min(1e-12).log()


def schedule(prediction_type: str, beta_schedule: str = "squaredcos_cap_v2", steps: int = 1000) -> DDPMScheduler:
    """A training schedule: cosine ("squaredcos_cap_v2") or "linear", as in the paper's Table 3.

    Raises ConfigError for a `prediction_type` other than "epsilon", "sample" (x0) and "v_prediction".
    """
    if prediction_type not in PREDICTIONS:
        close = nearest(str(prediction_type), PREDICTIONS)
        raise ConfigError(f"unknown prediction_type {prediction_type!r}{close}; choose from {', '.join(PREDICTIONS)}")
    return DDPMScheduler(
        num_train_timesteps=steps, beta_schedule=beta_schedule, prediction_type=prediction_type, clip_sample=False
    )


def ddim(training: DDPMScheduler) -> DDIMScheduler:
    """The sampler of prior and upsamplers: DDIM (arXiv 2010.02502) on the training schedule."""
    return cast(DDIMScheduler, DDIMScheduler.from_config(training.config, timestep_spacing="trailing", set_alpha_to_one=True))


def dpm_solver(levels: Mapping[str, Any], order: int = 2, clip: bool = False) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of an `order` with the noise levels of a schedule's configuration (arXiv 2211.01095).

    The decoder's sampler is of order 2. Order 1 is DDIM (section 4), as a scheduler that accepts timesteps.
    With `clip`, x0 estimates are clipped to [-1, 1].
    """
    solver: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": order, "timestep_spacing": "trailing"}
    # it clips by a quantile; with a maximum of 1, for any quantile, to [-1, 1]
    limits: dict[str, Any] = {"thresholding": clip, "sample_max_value": 1.0, "lower_order_final": True, "variance_type": None}
    return cast(DPMSolverMultistepScheduler, DPMSolverMultistepScheduler.from_config(dict(levels), **solver, **limits))


def ancestral(training: DDPMScheduler) -> UnCLIPScheduler:
    """The ancestral sampler with a learned variance, Karlo's (arXiv 2102.09672, section 3.1)."""
    kind = training.config["prediction_type"]
    return UnCLIPScheduler(training.config["num_train_timesteps"], "learned_range", prediction_type=kind)


def move_schedule(scheduler: DDPMScheduler, device: torch.device) -> None:
    """Move the tables of a training schedule to `device`: moving them at every call would synchronise with it."""
    for name in ("alphas", "betas", "alphas_cumprod"):
        setattr(scheduler, name, getattr(scheduler, name).to(device))


def levels(losses: Tensor, timesteps: Tensor, count: int, bins: int = 4) -> dict[str, Tensor]:
    """Mean loss per quarter of the schedule, NaN without examples: `t0` has the least noise."""
    which = (timesteps * bins // count).clamp(max=bins - 1)
    return {f"t{number}": masked_mean(losses, which == number) for number in range(bins)}


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` is true, NaN of none. Unlike `values[mask]`, it does not synchronise."""
    return torch.where(mask, values, 0).sum() / mask.sum()
