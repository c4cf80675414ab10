"""Image encoding: images to CLIP image embeddings, and to what the decoder would have drawn."""

# B images, D embedding dimension, H height, W width

from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...io.images import on_white
from ...io.pixels import normalize, to_uint8_tensor
from ..call import Call

if TYPE_CHECKING:
    from ..base import UnCLIPBase


def encode_image(pipe: "UnCLIPBase", image: Image.Image | list[Image.Image] | Tensor) -> Tensor:
    """CLIP image embeddings [B, D] of images, or of a tensor as `feature_extractor` makes it."""
    if not isinstance(image, Tensor):
        image = pipe.preprocess([image] if isinstance(image, Image.Image) else image)
    with pipe._run_stage("image_encoder", "image_encoder"):
        return pipe.image_encoder(image.to(pipe._execution_device, pipe.image_encoder.dtype)).image_embeds


def decoder_images(image: Image.Image | list[Image.Image], call: Call) -> Tensor:
    """Images as the decoder would draw them: [B, 3, H, W] in [-1, 1], the middle at the decoder's size."""
    images = [image] if isinstance(image, Image.Image) else image
    fitted = [ImageOps.fit(on_white(i), (call.width, call.height), Image.Resampling.BICUBIC) for i in images]
    return normalize(torch.stack([to_uint8_tensor(i) for i in fitted]))
