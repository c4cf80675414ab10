"""The decoder: CLIP image embedding and text to a 64 px picture."""

from .conditioning import UnCLIPTextProjModel, of_context
from .draft import DraftHead
from .model import Decoder

__all__ = ["Decoder", "DraftHead", "UnCLIPTextProjModel", "of_context"]
