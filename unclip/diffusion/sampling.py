"""The denoising loop of all stages and tools."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guidance import apply_guidance
from .predictions import NoiseSchedule, predict_x0

Generators = torch.Generator | list[torch.Generator] | None
# (latents, timestep) -> prediction; under guidance the latents are doubled, the unconditional half first
Predict = Callable[[Tensor, Tensor], Tensor]
# (step, timestep, latents after it, a function that returns the x0 estimate) -> latents of the next step
OnStep = Callable[[int, Tensor, Tensor, Callable[[], Tensor]], Tensor]


class Scheduler(NoiseSchedule, Protocol):
    """A scheduler of diffusers."""

    timesteps: Tensor

    @property
    def init_noise_sigma(self) -> Any: ...
    @property
    def set_timesteps(self) -> Callable[..., Any]: ...
    @property
    def scale_model_input(self) -> Callable[..., Any]: ...
    @property
    def step(self) -> Callable[..., Any]: ...


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions:
    """How `denoise` steps.

    Attributes:
        guidance: scale w; other than 1, `predict` is called with an unconditional and a conditional half, and the prediction
            is uncond + w (cond - uncond) (classifier-free guidance, arXiv 2207.12598, equation 6).
        interval: the lowest and highest timestep with guidance; outside it `predict` is called with the conditional half
            only (arXiv 2404.07724).
        shift: other than 1, moves the timesteps of schedulers that accept timesteps (`shift_timesteps`).
        eta: DDIM's share of fresh noise (arXiv 2010.02502, equation 16), for schedulers with this argument.
        generator: for schedulers that add noise.
        resample: how often every step but the last is taken, from `renoise(i, latents)` back at its noise level each time
            (RePaint, arXiv 2201.09865, section 4.2).
        renoise: needed where `resample` is above 1.
        on_step: may replace the latents after a step.
        postprocess: applied to the x0 estimates that `on_step` gets.
        stopped: once true, the remaining steps are left out.
        progress: wraps the timesteps.
    """

    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    shift: float = 1.0
    eta: float = 0.0
    generator: Generators = None
    resample: int = 1
    renoise: Callable[[int, Tensor], Tensor] | None = None
    on_step: OnStep | None = None
    postprocess: Callable[[Tensor], Tensor] = lambda x0: x0
    stopped: Callable[[], bool] = lambda: False
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter

    def __post_init__(self) -> None:
        if self.resample > 1 and self.renoise is None:
            raise ValueError(f"resample {self.resample} needs renoise")


def denoise(
    predict: Predict, latents: Tensor, scheduler: Scheduler, steps: int, options: DenoisingOptions | None = None
) -> Tensor:
    """Denoise `latents` [B, ...] from noise to samples with a diffusers scheduler.

    Predictions with twice the channels of the latents contain a variance, which is taken from the conditional half.
    """
    options = options or DenoisingOptions()
    # keep a CPU copy: comparing GPU timesteps would synchronise every step
    timesteps = place_timesteps(scheduler, steps, options.shift)
    device_timesteps, levels = timesteps.to(latents.device, non_blocking=True), timesteps.tolist()
    latents = latents * scheduler.init_noise_sigma
    for i, t in enumerate(options.progress(timesteps)):
        is_guided = options.guidance != 1 and options.interval[0] <= levels[i] <= options.interval[1]
        for again in range(options.resample if i + 1 < len(timesteps) else 1):
            if options.stopped():
                return latents
            if again and options.renoise is not None:
                latents = options.renoise(i, latents)
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if is_guided else latents, t)
            prediction = predict(model_input, device_timesteps[i])
            if is_guided:
                prediction = apply_guidance(prediction, latents.shape[1], options.guidance)
            previous = timesteps[i + 1] if i + 1 < len(timesteps) else None
            step, prediction = _step(scheduler, prediction, t, previous, latents, options)
            x0 = partial(_x0_estimate, scheduler, step, prediction, latents, device_timesteps[i], options)
            latents = step.prev_sample
            if options.on_step is not None:
                latents = options.on_step(i, device_timesteps[i], latents, x0)
    return latents


def _step(
    scheduler: Scheduler, prediction: Tensor, t: Tensor, previous: Tensor | None, latents: Tensor, options: DenoisingOptions
) -> tuple[Any, Tensor]:
    """-> the output of the scheduler's step from timestep `t` to `previous`, and the prediction that it was given."""
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if "generator" in accepted:
        extra["generator"] = options.generator
    if "eta" in accepted:
        extra["eta"] = options.eta
    if "prev_timestep" in accepted:
        extra["prev_timestep"] = previous
    elif prediction.shape[1] == 2 * latents.shape[1]:
        prediction = prediction[:, : latents.shape[1]]
    return scheduler.step(prediction, t, latents, **extra), prediction


def _x0_estimate(
    scheduler: Scheduler, step: Any, prediction: Tensor, noised: Tensor, t: Tensor, options: DenoisingOptions
) -> Tensor:
    """The x0 estimate of a step: the scheduler's `pred_original_sample`, where its output has one."""
    found: Tensor | None = getattr(step, "pred_original_sample", None)
    if found is None:
        finer = torch.promote_types(noised.dtype, torch.float32)
        found = predict_x0(scheduler, prediction.to(finer), noised.to(finer), t.expand(len(noised))).to(noised.dtype)
    return options.postprocess(found)


def place_timesteps(scheduler: Scheduler, steps: int, shift: float = 1.0) -> Tensor:
    """Set a scheduler's `steps` timesteps, moved by `shift` where it accepts timesteps; -> those timesteps, on the CPU.

    Raises ValueError for fewer than 1 step, and for more than the scheduler has levels.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    config = scheduler.config
    if steps > config.num_train_timesteps:
        raise ValueError(f"steps must be at most {config.num_train_timesteps}, got {steps}")
    trailing = config.get("timestep_spacing") == "trailing"
    if (shift != 1 or trailing) and "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=shift_timesteps(steps, shift, config.num_train_timesteps))
    else:
        scheduler.set_timesteps(steps)
        if trailing:  # for some numbers, 61 the first, rounding adds one more timestep, which is -1
            scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    return scheduler.timesteps


def shift_timesteps(steps: int, shift: float, levels: int = 1000) -> list[int]:
    """`steps` timesteps from `levels` - 1 downwards, with u = 1 - i / steps moved to s u / (1 + (s - 1) u).

    A shift s above 1 takes more of the steps at high noise, where an image's shape is determined (arXiv 2403.03206, equation
    23, with their square root of m / n for s); 1 is even ("trailing") spacing. Raises ValueError for more steps than levels.
    """
    if steps > levels:
        raise ValueError(f"steps must be at most {levels}, got {steps}")
    found: list[int] = []
    for i in range(steps):
        u = 1 - i / steps
        t = round(levels * shift * u / (1 + (shift - 1) * u)) - 1
        t = min(t, found[-1] - 1) if found else t
        found.append(max(t, steps - 1 - i))  # no timestep twice, and the last not below 0
    return found


def noise(shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal noise of `shape`; a list has one generator for each row.

    Sampled in float32 (float64 for float64) and then cast, so that a seed gives the same image in every dtype.
    """
    sampled = dtype if dtype == torch.float64 else torch.float32
    return randn_tensor(shape, generator=generator, device=device, dtype=sampled).to(dtype)
