"""Diffusion: noise schedules, prediction types, samplers and schedulers, tiling and the denoising loop."""

from typing import Any

from ..io.moved import attribute


def __getattr__(name: str) -> Any:
    return attribute(__name__, name)  # a module in version 0.1
