"""Prediction types of a diffusion network: x0 ("sample"), eps ("epsilon") and v ("v_prediction"); conversion between them.

With alpha_bar the share of the signal at a timestep, x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (arXiv 2006.11239,
equation 4) and v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (arXiv 2202.00512, appendix D).
"""

# B batch

from typing import Any, Protocol, cast

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import IntTensor, Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class NoiseSchedule(Protocol):
    """The noise levels and the prediction type of a diffusers scheduler."""

    alphas_cumprod: Tensor

    @property
    def config(self) -> Any: ...


def x0_from_prediction(prediction_type: str, prediction: Tensor, noised: Tensor, alpha_bar: Tensor) -> Tensor:
    """The x0 of a prediction [B, ...] from `noised` [B, ...]; `alpha_bar` broadcasts against them.

    Raises ValueError for an unknown `prediction_type`.
    """
    if prediction_type == "sample":
        return prediction
    if prediction_type == "epsilon":
        return (noised - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noised - (1 - alpha_bar).sqrt() * prediction
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def predict_x0(scheduler: NoiseSchedule, prediction: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
    """The x0 [B, ...] of a prediction at `timesteps` [B] of a scheduler."""
    alpha_bar = _alpha_bar(scheduler, timesteps, noised)
    return x0_from_prediction(scheduler.config.prediction_type, prediction, noised, alpha_bar)


def target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The training target for x0 `clean` and eps `noise`, by the scheduler's `prediction_type`."""
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, cast(IntTensor, timesteps))
    raise ValueError(f"unknown prediction_type {kind!r}")


def offset_x0(scheduler: NoiseSchedule, prediction: Tensor, offset: Tensor, timesteps: Tensor) -> Tensor:
    """The prediction whose x0 differs by `offset` [B, ...] from that of `prediction`, for the same noised sample."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return prediction + offset
    alpha_bar = _alpha_bar(scheduler, timesteps, offset)
    scale = (1 - alpha_bar).sqrt()
    return prediction - offset * (alpha_bar.sqrt() / scale if kind == "epsilon" else 1 / scale)


def _alpha_bar(scheduler: NoiseSchedule, timesteps: Tensor, like: Tensor) -> Tensor:
    """Cumulative alphas at `timesteps` [B], in the dtype of `like` and shaped to broadcast against it."""
    return scheduler.alphas_cumprod.to(like)[timesteps].view(-1, *[1] * (like.ndim - 1))
