"""The decoder: CLIP image embedding and text to a 64 px picture."""

from .conditioning import UnCLIPTextProjModel
from .model import Decoder

__all__ = ["Decoder", "UnCLIPTextProjModel"]
