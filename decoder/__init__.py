"""The decoder: CLIP image embedding and text to a 64 px image."""

import warnings
from typing import Any

from .conditioning import UnCLIPTextProjModel, expand_to_context
from .draft import DraftHead
from .model import Decoder

__all__ = ["Decoder", "DraftHead", "UnCLIPTextProjModel", "expand_to_context"]


def __getattr__(name: str) -> Any:
    if name == "of_context":
        message = "decoder.of_context is now decoder.expand_to_context; the old name will be removed in version 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return expand_to_context
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
