"""CLIP: its towers, the judge, classification and search by its embeddings."""

from typing import Any

from ..io.moved import attribute
from .model import CLIP
from .towers import ImageTower, TextTower

__all__ = ["CLIP", "ImageTower", "TextTower"]


def __getattr__(name: str) -> Any:
    return attribute(__name__, name)  # a module in version 0.1
