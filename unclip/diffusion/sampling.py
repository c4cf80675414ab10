"""THE denoising loop: prior, decoder and upsamplers, text to image and every manipulation, run through it."""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guidance import apply_guidance
from .predictions import predict_x0

Generators = torch.Generator | list[torch.Generator] | None
# (latents, timestep) -> prediction; where it is guided the latents arrive doubled, unconditional half first
Predict = Callable[[Tensor, Tensor], Tensor]
# (step, timestep, latents after it, what the clean sample is expected to be) -> latents to go on with
OnStep = Callable[[int, Tensor, Tensor, Callable[[], Tensor]], Tensor]


def denoise(
    predict: Predict,
    latents: Tensor,
    scheduler,
    steps: int,
    *,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    generator: Generators = None,
    eta: float = 0.0,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: OnStep | None = None,
    stopped: Callable[[], bool] = lambda: False,
    resample: int = 1,
    renoise: Callable[[int, Tensor], Tensor] | None = None,
    shift: float = 1.0,
) -> Tensor:
    """Take `latents` [B, ...] from noise to a sample with a diffusers scheduler.

    `guidance` w other than 1 asks `predict` for an unconditional and a conditional half and follows uncond + w (cond - uncond)
    (classifier-free guidance, arXiv 2207.12598, equation 6); predictions with twice the channels carry a variance,
    which is taken from the conditional half. At timesteps outside `interval` there is no guidance, and `predict` is asked for
    the conditional half alone (arXiv 2404.07724). `eta` is DDIM's share of fresh noise (arXiv 2010.02502, equation 16), where
    the scheduler knows of one. `generator` feeds schedulers that add noise. `on_step(i, t, latents, clean)` may
    replace the latents after a step, and `clean()` is the sample [B, ...] that the step's prediction stands for; once
    `stopped()` is true the remaining steps are left out.
    With `resample` above 1 every step but the last is taken that often, from `renoise(i, latents)` back at its own noise
    level each time (RePaint, arXiv 2201.09865, section 4.2). A `shift` other than 1 moves the timesteps of schedulers that
    can be told them (`shift_timesteps`).
    """
    # keep a CPU copy: comparing GPU timesteps would synchronise every step
    timesteps = place_timesteps(scheduler, steps, shift)
    told, levels = timesteps.to(latents.device, non_blocking=True), timesteps.tolist()
    takes = inspect.signature(scheduler.step).parameters
    latents = latents * scheduler.init_noise_sigma
    for i, t in enumerate(progress(timesteps)):
        guided = guidance != 1 and interval[0] <= levels[i] <= interval[1]
        for again in range(resample if i + 1 < len(timesteps) else 1):
            if stopped():
                return latents
            if again:
                latents = renoise(i, latents)
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            prediction = predict(model_input, told[i])
            if guided:
                prediction = apply_guidance(prediction, latents.shape[1], guidance)
            extra = {"generator": generator} if "generator" in takes else {}
            if "eta" in takes:
                extra["eta"] = eta
            if "prev_timestep" in takes:
                extra["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
            elif prediction.shape[1] == 2 * latents.shape[1]:
                prediction = prediction[:, : latents.shape[1]]
            before, step = latents, scheduler.step(prediction, t, latents, **extra)
            latents = step.prev_sample
            if on_step is not None:
                latents = on_step(i, told[i], latents, partial(_clean, scheduler, step, prediction, before, told[i]))
    return latents


def _clean(scheduler: Any, step: Any, prediction: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    """The clean sample that the prediction of a scheduler's `step` stands for: in its own words, where it says it."""
    told = getattr(step, "pred_original_sample", None)
    if told is not None:
        return told
    finer = torch.promote_types(noised.dtype, torch.float32)
    return predict_x0(scheduler, prediction.to(finer), noised.to(finer), t.expand(len(noised))).to(noised.dtype)


def place_timesteps(scheduler, steps: int, shift: float = 1.0) -> Tensor:
    """Set a scheduler's `steps` timesteps, moved by `shift` where it can be told them; -> those timesteps, on the CPU.

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
        if trailing:  # for some numbers, 61 the first, rounding makes one more of them than was asked for, and that is -1
            scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    return scheduler.timesteps


def shift_timesteps(steps: int, shift: float, levels: int = 1000) -> list[int]:
    """`steps` timesteps from `levels` - 1 downwards, u = 1 - i / steps of the way up moved to s u / (1 + (s - 1) u).

    A shift s above 1 takes more of the steps at high noise, where an image's shape is decided (arXiv 2403.03206, equation
    23, with their square root of m / n for s); 1 is even ("trailing") spacing. Raises ValueError for more steps than levels.
    """
    if steps > levels:
        raise ValueError(f"steps must be at most {levels}, got {steps}")
    found: list[int] = []
    for i in range(steps):
        u = 1 - i / steps
        t = round(levels * shift * u / (1 + (shift - 1) * u)) - 1
        t = min(t, found[-1] - 1) if found else t
        found.append(max(t, steps - 1 - i))  # no timestep comes twice, and the last is not below 0
    return found


def noise(shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal noise of `shape`; a list of generators gives each row its own.

    Drawn in float32 (float64 for float64) and then cast, so that a seed means the same image in every dtype.
    """
    drawn = dtype if dtype == torch.float64 else torch.float32
    return randn_tensor(shape, generator=generator, device=device, dtype=drawn).to(dtype)
