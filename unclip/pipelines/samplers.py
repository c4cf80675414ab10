"""The decoder's samplers, by name, on its checkpoint's own noise levels."""

from typing import Any

from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch import nn

from ..diffusion.scheduler import UnCLIPScheduler
from ..diffusion.schedules import dpm_solver
from ..runtime.config import nearest

# With the fewest steps that each can take: DPM-Solver++ of second order (arXiv 2211.01095), DDIM (arXiv 2010.02502), and
# ancestral sampling, with the network's own variance where it predicts one (arXiv 2102.09672).
SAMPLERS = {"dpmsolver++2m": 2, "ddim": 1, "ancestral": 1}
DISTILLED = "distilled"  # where the checkpoint has a distilled decoder: that, in as few steps as it was made for
# Both directions of DDIM take the same steps and clip nothing between them: what is clipped cannot be inverted.
_DDIM = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "thresholding": False}


def noise_levels(scheduler: Any) -> dict[str, Any]:
    """A schedule's configuration in full: `from_config` would put its own defaults where the other class's were kept."""
    return {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}


def ddim(scheduler: Any, clip: bool = False) -> DDIMScheduler:
    """DDIM, whose inverse is `inverse_ddim`, on a scheduler's noise levels; with `clip`, x0 estimates stay in [-1, 1].

    A network that predicts noise says little of the image at the highest noise levels: there clipping holds it.
    """
    return DDIMScheduler.from_config(noise_levels(scheduler), **(_DDIM | {"clip_sample": clip}))


def inverse_ddim(scheduler: Any) -> DDIMInverseScheduler:
    """From an image to the noise that `ddim` draws it from (paper, section 3)."""
    return DDIMInverseScheduler.from_config(noise_levels(scheduler), **_DDIM)


def choose_sampler(name: str | None, steps: int, scheduler: Any, decoder: nn.Module, known: list[str]) -> Any:
    """The sampler of this name, on the noise levels of the checkpoint's `scheduler`; None: that scheduler itself.

    Raises ValueError for a name that is not among the `known`, and for fewer steps than it needs.
    """
    if name is None:
        return scheduler
    if name == DISTILLED:
        return dpm_solver(noise_levels(scheduler), order=1)
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}{nearest(str(name), known)}; choose from {', '.join(known)}")
    if steps < SAMPLERS[name]:
        raise ValueError(f"the sampler {name} needs at least {SAMPLERS[name]} steps, got {steps}")
    levels = noise_levels(scheduler)
    clip = levels.get("clip_sample", False)
    if name == "ddim":
        return ddim(scheduler, clip)
    if name == "ancestral":
        is_learned = decoder.config.out_channels == 2 * decoder.config.in_channels
        kind, variance = (UnCLIPScheduler, "learned_range") if is_learned else (DDPMScheduler, "fixed_small")
        return kind.from_config(levels, variance_type=variance)
    return dpm_solver(levels, clip=clip)
