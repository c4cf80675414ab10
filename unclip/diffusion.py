"""What the diffusion stages share in training: noise levels, noising, prediction targets and schedules."""

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor


def logit_normal_timesteps(random: Tensor, count: int, mean: float = 0.2, std: float = 1.2) -> Tensor:
    """Timesteps [B] of a schedule with `count` steps, their logit normally distributed; `random` [B] uniform in [0, 1).

    Puts the effort between the extremes, where a picture's shapes are decided (arXiv 2403.03206, section 3.1).
    """
    level = torch.sigmoid(mean + std * torch.special.ndtri(random.double().clamp(1e-6, 1 - 1e-6)))
    return (level * count).long().clamp(0, count - 1)


def uniform_timesteps(random: Tensor, count: int) -> Tensor:
    """Timesteps [B], uniform over a schedule with `count` steps; `random` [B] uniform in [0, 1)."""
    return (random.double() * count).long().clamp(0, count - 1)


def target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network should answer, by the scheduler's `prediction_type`: epsilon, sample (x0) or v_prediction."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)  # arXiv 2202.00512, appendix D
    raise ValueError(f"unknown prediction_type {kind!r}")


def clean_from(scheduler: DDPMScheduler, prediction: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
    """The un-noised picture (x0) that a prediction stands for."""
    shape = (-1,) + (1,) * (noised.ndim - 1)
    alpha_bar = scheduler.alphas_cumprod.to(noised)[timesteps].view(shape)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (noised - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    return alpha_bar.sqrt() * noised - (1 - alpha_bar).sqrt() * prediction


def shifted(scheduler: DDPMScheduler, prediction: Tensor, by: Tensor, timesteps: Tensor) -> Tensor:
    """The prediction that stands for a clean picture which differs by `by`."""
    shape = (-1,) + (1,) * (by.ndim - 1)
    alpha_bar = scheduler.alphas_cumprod.to(by)[timesteps].view(shape)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return prediction + by
    scale = (1 - alpha_bar).sqrt()
    return prediction - by * (alpha_bar.sqrt() / scale if kind == "epsilon" else 1 / scale)


def schedule(prediction_type: str, beta_schedule: str = "squaredcos_cap_v2", steps: int = 1000) -> DDPMScheduler:
    """A training schedule: cosine ("squaredcos_cap_v2") or "linear", as in the paper's Table 3."""
    return DDPMScheduler(
        num_train_timesteps=steps, beta_schedule=beta_schedule, prediction_type=prediction_type, clip_sample=False
    )


def ddim(training: DDPMScheduler) -> DDIMScheduler:
    """The scheduler that prior and upsamplers are sampled with: DDIM (arXiv 2010.02502) on the training schedule."""
    return DDIMScheduler.from_config(training.config, timestep_spacing="trailing", set_alpha_to_one=True)


def dpm_solver(training: DDPMScheduler) -> DPMSolverMultistepScheduler:
    """The scheduler that the decoder is sampled with: DPM-Solver++(2M) on the training schedule (arXiv 2211.01095)."""
    return DPMSolverMultistepScheduler.from_config(
        training.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing", lower_order_final=True
    )


def levels(losses: Tensor, timesteps: Tensor, count: int, bins: int = 4) -> dict[str, Tensor]:
    """Mean loss per quarter of the schedule: `t0` holds the least noise."""
    which = (timesteps * bins // count).clamp(max=bins - 1)
    means = {}
    for number in range(bins):
        chosen = losses[which == number]
        if len(chosen):
            means[f"t{number}"] = chosen.mean()
    return means
