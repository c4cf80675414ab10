"""The prior: a text to a CLIP image embedding."""

from .autoregressive import AutoregressivePrior
from .model import DiffusionPrior

__all__ = ["AutoregressivePrior", "DiffusionPrior"]
