"""The inputs of CLIP's towers: tokens of texts, and normalised pixels of images at the tower's size.

PIL images are preprocessed by the checkpoint's preprocessor, which resizes 8-bit pixels with Pillow's bicubic filter, as in
the towers' training; tensors are resized with torch's antialiased bicubic filter.
"""

# B batch, N tokens, H height, W width, S side of the image tower's input

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..io.images import limit_aspect_ratio, on_white
from .characters import read_characters


class ImagePreprocessor(Protocol):
    """An image processor of transformers."""

    @property
    def crop_size(self) -> Mapping[str, int]: ...
    @property
    def image_mean(self) -> Sequence[float]: ...
    @property
    def image_std(self) -> Sequence[float]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], padding: str | bool = "max_length") -> BatchEncoding:
    """`input_ids` and `attention_mask` [B, N] of texts, truncated to the tokenizer's length, emoji replaced by their names."""
    texts, length = list(map(read_characters, texts)), tokenizer.model_max_length
    return tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")


def truncated_parts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], input_ids: Tensor) -> Iterator[str]:
    """The parts of texts that `tokenize` truncated; `input_ids` [B, N] are the tokens that it returned."""
    length = tokenizer.model_max_length
    untruncated = tokenizer(list(map(read_characters, texts)), padding=False, verbose=False)["input_ids"]
    for truncated, tokens in zip(input_ids, untruncated, strict=True):
        if len(tokens) > length:
            start, full = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (truncated, tokens))
            yield full[len(start) :].strip()


def preprocess(feature_extractor: ImagePreprocessor, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
    """An image tower's input [B, 3, S, S]: shorter side resized to S, centre cropped, normalised.

    `images` are PIL images, which are composited on white, or a tensor [B, 3, H, W] in [0, 1]. Raises ValueError for
    anything else.
    """
    if isinstance(images, Tensor):
        return _normalized(feature_extractor, images)
    images = [images] if isinstance(images, Image.Image) else list(images)
    wrong = next((image for image in images if not isinstance(image, Image.Image)), None)
    if wrong is not None:
        raise ValueError(f"images must be PIL images or a tensor, got {type(wrong).__name__}")
    return feature_extractor(images=[on_white(limit_aspect_ratio(image)) for image in images], return_tensors="pt").pixel_values


def _normalized(feature_extractor: ImagePreprocessor, images: Tensor) -> Tensor:
    """`preprocess` of a tensor."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"images must be in [0, 1], got [{images.min():.3g}, {images.max():.3g}]")
    pixels = _resize_square(images.float(), feature_extractor.crop_size["height"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (feature_extractor.image_mean, feature_extractor.image_std))
    return (pixels - mean.to(pixels)) / std.to(pixels)


def _resize_square(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] to [B, 3, size, size]: the shorter side resized, then the centre cropped."""
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    target = (max(round(height * scale), size), max(round(width * scale), size))
    pixels = F.interpolate(pixels, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]
