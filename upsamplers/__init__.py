"""The upsamplers: 64 px to 256 px, and 256 px to 1024 px."""

from .model import Upsampler

__all__ = ["Upsampler"]
