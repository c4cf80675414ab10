"""The decoder: CLIP image embedding and text to a 64 px picture."""

from .conditioning import UnCLIPTextProjModel, of_context
from .model import Decoder

__all__ = ["Decoder", "UnCLIPTextProjModel", "of_context"]
