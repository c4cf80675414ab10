"""Diffusers-style pipelines over the stages."""

from .image_variation import UnCLIPImageVariationPipeline
from .text_to_image import UnCLIPPipeline

__all__ = ["UnCLIPImageVariationPipeline", "UnCLIPPipeline"]
