"""Sampling settings: steps, guidance and the like, with their defaults and their validation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

MAX_IMAGES = 10_000
BATCH = {64: 16, 256: 8, 1024: 4}  # size: number of images to sample at once, limited by memory at 1024 px
INVERSION_STEPS = 50  # of DDIM, from an image to its noise and back

NO_PRIOR = {"prior_guidance_scale": 1.0}  # of calls without a prior: then the decoder's scale decides whether guidance is on
NO_DECODER = {"decoder_guidance_scale": 1.0}


@dataclass(frozen=True)
class SamplingSettings:
    """The sampling settings of one call's stages. The defaults, Karlo's values, are for checkpoints without defaults.

    The `*_num_inference_steps` are steps of prior, decoder, 256 px and 1024 px upsampler. A guidance scale of 1 is no
    guidance. `decoder_guidance_interval` is (low, high) in shares of the decoder's timesteps, 0 the clean image
    (arXiv 2404.07724); `decoder_timestep_shift` is `shift_timesteps`'s. `prior_candidates` image embeddings are sampled per
    image, of which the nearest to the text is used. `upsampler_noise_level` is the standard deviation, in units of
    [-1, 1], of the noise on an upsampler's input.

    Raises:
        ValueError: for a setting out of range, naming it and its value.
    """

    prior_num_inference_steps: int = 25
    decoder_num_inference_steps: int = 25
    super_res_num_inference_steps: int = 7
    upsampler_1024_num_inference_steps: int = 2
    prior_guidance_scale: float = 4.0
    decoder_guidance_scale: float = 8.0
    decoder_guidance_interval: Sequence[float] = (0.0, 1.0)
    decoder_timestep_shift: float = 1.0
    prior_candidates: int = 1
    upsampler_noise_level: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_valid, wanted = next((valid, text) for ending, valid, text in _RULES if name.endswith(ending))
            if not is_valid(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")

    @classmethod
    def resolve(cls, defaults: Mapping[str, Any] | None, arguments: Mapping[str, Any]) -> Self:
        """For each setting the argument of its name that is not None, else the checkpoint's default, else the package's.

        Other `arguments` are ignored.
        """
        names = {field.name for field in fields(cls)}
        given = {name: value for name, value in arguments.items() if name in names and value is not None}
        return cls(**{**(defaults or {}), **given})

    def guidance_scale(self, stage: str) -> float:
        """The scale of "prior" or "decoder"; if no scale exceeds 1, guidance is off everywhere (as in diffusers)."""
        is_guided = self.prior_guidance_scale > 1 or self.decoder_guidance_scale > 1
        return getattr(self, f"{stage}_guidance_scale") if is_guided else 1.0


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raises ValueError for a checkpoint's sampling defaults that are unknown or out of range."""
    unknown = set(defaults) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"unknown sampling defaults {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
    SamplingSettings(**defaults)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting out of range, naming it and its value; for callers of version 0.1."""
    SamplingSettings(**settings)


def images_at_once(size: int) -> int:
    """The number of images of `size` px to sample together."""
    return BATCH.get(size, 4)


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and low <= value <= high


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(v, int | float) for v in value)
        and 0 <= value[0] < value[1] <= 1
    )


# the end of a setting's name, the check of its value, and the text of the error message
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("scale", lambda value: _is_number(value, 0, math.inf) and math.isfinite(value), "a number of at least 0"),
    ("interval", _is_interval, "(low, high) with 0 <= low < high <= 1"),
    ("shift", lambda value: _is_number(value, 0.01, 100), "from 0.01 to 100"),
    ("level", lambda value: _is_number(value, 0, 1), "from 0 to 1"),
    ("", lambda value: isinstance(value, int) and value >= 1, "a whole number of at least 1"),
)
DEFAULTS = asdict(SamplingSettings())
