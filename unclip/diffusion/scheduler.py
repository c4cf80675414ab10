"""The ancestral sampler of Karlo's checkpoints: DDPM (arXiv 2006.11239) over a subset of a cosine schedule's steps."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .predictions import x0_from_prediction
from .sampling import Generators

VARIANCES = ("fixed_small_log", "learned_range")
PREDICTIONS = ("epsilon", "sample")


@dataclass
class UnCLIPSchedulerOutput(BaseOutput):
    """`prev_sample` at the next timestep, and `pred_original_sample`, the x0 estimate."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class UnCLIPScheduler(SchedulerMixin, ConfigMixin):
    """diffusers' scheduler of this name, with the same configuration and the same results, that also works with one step.

    Betas are recomputed for the steps that are skipped. A `learned_range` variance is interpolated, in log space and by
    the network's second half of channels, between the posterior's and beta (arXiv 2102.09672, equation 15).
    """

    config_name = "scheduler_config.json"  # type: ignore[assignment]  # ConfigMixin declares it None, SchedulerMixin a string
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        variance_type: str = "fixed_small_log",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: str = "epsilon",
        beta_schedule: str = "squaredcos_cap_v2",
    ):
        for name, value, known in (
            ("variance_type", variance_type, VARIANCES),
            ("prediction_type", prediction_type, PREDICTIONS),
            ("beta_schedule", beta_schedule, ("squaredcos_cap_v2",)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
        cosine = DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule)
        self.betas, self.alphas, self.alphas_cumprod = cosine.betas, cosine.alphas, cosine.alphas_cumprod
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def scale_model_input(self, sample: Tensor, timestep: int | None = None) -> Tensor:
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """`num_inference_steps` timesteps evenly from the last to 0; a single one is the last."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        last = self.config["num_train_timesteps"] - 1
        steps = np.arange(num_inference_steps)[::-1] * (last / max(num_inference_steps - 1, 1))
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(steps.round().astype(np.int64) if num_inference_steps > 1 else np.array([last]))
        self.timesteps = self.timesteps.to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> UnCLIPSchedulerOutput | tuple[Tensor, Tensor]:
        """From `sample` [B, C, ...] at `timestep` to `prev_timestep` (default: the one before; the end, of one step).

        `model_output` [B, C, ...], or [B, 2C, ...] with a learned variance. Noise is sampled in its dtype.
        """
        t, predicted_variance = int(timestep), None
        if self.config["variance_type"] == "learned_range" and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, predicted_variance = model_output.chunk(2, 1)
        following = -1 if self.num_inference_steps == 1 else t - 1
        previous = following if prev_timestep is None else int(prev_timestep)
        # in float32 for every dtype of the sample, as in diffusers
        alpha_bar = self.alphas_cumprod[t]
        alpha_bar_previous = self.alphas_cumprod[previous] if previous >= 0 else torch.tensor(1.0)
        beta = self.betas[t] if previous == t - 1 else 1 - alpha_bar / alpha_bar_previous
        alpha = self.alphas[t] if previous == t - 1 else 1 - beta
        left, left_previous = 1 - alpha_bar, 1 - alpha_bar_previous

        clean = x0_from_prediction(self.config["prediction_type"], model_output, sample, alpha_bar)
        if self.config["clip_sample"]:
            clean = clean.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        # equation 7 of arXiv 2006.11239
        mean = (alpha_bar_previous**0.5 * beta / left) * clean + (alpha**0.5 * left_previous / left) * sample
        if previous >= 0:
            noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=model_output.dtype)
            mean = mean + self._deviation(beta, left, left_previous, predicted_variance) * noise
        if not return_dict:
            return mean, clean
        return UnCLIPSchedulerOutput(prev_sample=mean, pred_original_sample=clean)

    def _deviation(self, beta: Tensor, left: Tensor, left_previous: Tensor, predicted: Tensor | None) -> Tensor:
        """The standard deviation of a step's noise."""
        posterior = left_previous / left * beta
        if self.config["variance_type"] == "fixed_small_log":
            return (0.5 * posterior.clamp(min=1e-20).log()).exp()
        if predicted is None:
            raise ValueError("variance_type is learned_range, but the network predicts no variance")
        share = (predicted + 1) / 2
        return (0.5 * (share * beta.log() + (1 - share) * posterior.log())).exp()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples [B, ...] noised to `timesteps` [B]."""
        alpha_bar = self.alphas_cumprod.to(original_samples)[timesteps.to(original_samples.device)]
        alpha_bar = alpha_bar.view(-1, *[1] * (original_samples.ndim - 1))
        return alpha_bar**0.5 * original_samples + (1 - alpha_bar) ** 0.5 * noise


def replace_stock_unclip(scheduler: Any) -> Any:
    """This package's `UnCLIPScheduler` for diffusers' one of the same name; any other scheduler unchanged."""
    if type(scheduler).__name__ == "UnCLIPScheduler" and not isinstance(scheduler, UnCLIPScheduler):
        return cast(UnCLIPScheduler, UnCLIPScheduler.from_config(scheduler.config))
    return scheduler
