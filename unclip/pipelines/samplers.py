"""The decoder's samplers, by name, with its checkpoint's noise levels."""

from typing import Any, cast

from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from ..diffusion.scheduler import UnCLIPScheduler
from ..diffusion.schedules import dpm_solver
from ..runtime.config import nearest

# With the fewest steps that each can take: DPM-Solver++ of second order (arXiv 2211.01095), DDIM (arXiv 2010.02502), and
# ancestral sampling, with the network's own variance where it predicts one (arXiv 2102.09672).
SAMPLERS = {"dpmsolver++2m": 2, "ddim": 1, "ancestral": 1}
DISTILLED = "distilled"  # the distilled decoder, for checkpoints that have one
# Both directions of DDIM take the same steps, and nothing is clipped, because clipping cannot be inverted.
_DDIM: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "thresholding": False}


def noise_levels(scheduler: Any) -> dict[str, Any]:
    """A scheduler's full configuration: without it, `from_config` of another class replaces values that are defaults."""
    return {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}


def ddim(scheduler: Any, clip: bool = False) -> DDIMScheduler:
    """DDIM, whose inverse is `inverse_ddim`, on a scheduler's noise levels; with `clip`, x0 estimates stay in [-1, 1].

    A network that predicts noise has a poor estimate of the image at the highest noise levels, which clipping bounds.
    """
    return cast(DDIMScheduler, DDIMScheduler.from_config(noise_levels(scheduler), **(_DDIM | {"clip_sample": clip})))


def inverse_ddim(scheduler: Any) -> DDIMInverseScheduler:
    """From an image to the noise from which `ddim` samples it (paper, section 3)."""
    return cast(DDIMInverseScheduler, DDIMInverseScheduler.from_config(noise_levels(scheduler), **_DDIM))


def choose_sampler(name: str | None, steps: int, scheduler: Any, decoder: ModelMixin, known: list[str]) -> Any:
    """The sampler of this name, with the noise levels of the checkpoint's `scheduler`; None: that scheduler itself.

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
        is_learned = decoder.config["out_channels"] == 2 * decoder.config["in_channels"]
        if is_learned:
            return UnCLIPScheduler.from_config(levels, variance_type="learned_range")
        return DDPMScheduler.from_config(levels, variance_type="fixed_small")
    return dpm_solver(levels, clip=clip)
