"""What CLIP's towers take: texts as tokens, images as normalised pixels of the tower's size.

Both are done here for every user of a CLIP. PIL images go through the checkpoint's own preprocessor, which resizes 8-bit
pixels by Pillow's bicubic filter, as the images that the towers were trained on were; tensors, which have no 8-bit form, are
resized by torch's antialiased bicubic filter.
"""

# B batch, N tokens, H height, W width, S side of the image tower's input

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..io.images import on_white, towards_square
from .characters import read_characters


def tokenize(tokenizer: Any, texts: Sequence[str], padding: str | bool = "max_length") -> Any:
    """`input_ids` and `attention_mask` [B, N] of texts, truncated to the tokenizer's length; emoji are read as their names."""
    texts, length = list(map(read_characters, texts)), tokenizer.model_max_length
    return tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")


def truncated_parts(tokenizer: Any, texts: Sequence[str], input_ids: Tensor) -> Iterator[str]:
    """What `tokenize` cut off the texts that are too long; `input_ids` [B, N] is what it made of them."""
    length = tokenizer.model_max_length
    untruncated = tokenizer(list(map(read_characters, texts)), padding=False, verbose=False)["input_ids"]
    for kept, tokens in zip(input_ids, untruncated, strict=True):
        if len(tokens) > length:
            start, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (kept, tokens))
            yield whole[len(start) :].strip()


def preprocess(feature_extractor: Any, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
    """Images as an image tower takes them, [B, 3, S, S]: shorter side resized to S, centre cropped, normalised.

    `images` are PIL images, whose transparency is put on white, or a tensor [B, 3, H, W] in [0, 1]. Raises ValueError for
    anything else.
    """
    if isinstance(images, Tensor):
        return _normalized(feature_extractor, images)
    images = [images] if isinstance(images, Image.Image) else list(images)
    wrong = next((image for image in images if not isinstance(image, Image.Image)), None)
    if wrong is not None:
        raise ValueError(f"images must be PIL images or a tensor, got {type(wrong).__name__}")
    return feature_extractor(images=[on_white(towards_square(image)) for image in images], return_tensors="pt").pixel_values


def _normalized(feature_extractor: Any, images: Tensor) -> Tensor:
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
