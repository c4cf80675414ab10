"""The prior: a text to a CLIP image embedding."""

from .model import DiffusionPrior

__all__ = ["DiffusionPrior"]
