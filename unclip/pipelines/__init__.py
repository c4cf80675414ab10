"""Diffusers-style pipelines over the stages."""

from .image_variation import UnCLIPImageVariationPipeline
from .inpaint import UnCLIPInpaintPipeline
from .interpolation import UnCLIPInterpolationPipeline, UnCLIPTextDiffPipeline
from .pca import UnCLIPPCAPipeline
from .prior import UnCLIPPriorPipeline
from .text_to_image import UnCLIPPipeline

__all__ = [
    "UnCLIPImageVariationPipeline",
    "UnCLIPInpaintPipeline",
    "UnCLIPInterpolationPipeline",
    "UnCLIPPCAPipeline",
    "UnCLIPPipeline",
    "UnCLIPPriorPipeline",
    "UnCLIPTextDiffPipeline",
]
