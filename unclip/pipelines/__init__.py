"""Diffusers-style pipelines over the stages."""

from .text_to_image import UnCLIPPipeline

__all__ = ["UnCLIPPipeline"]
