"""Image encoding: images to CLIP image embeddings, and to the decoder's size and range."""

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
    """CLIP image embeddings [B, D] of images, or of `feature_extractor`'s output. Raises ValueError without an image tower."""
    if pipe.image_encoder is None:
        raise ValueError("this checkpoint has no image_encoder")
    if not isinstance(image, Tensor):
        image = pipe.preprocess([image] if isinstance(image, Image.Image) else image)
    with pipe._run_stage("image_encoder", "image_encoder"):
        return pipe.image_encoder(image.to(pipe._execution_device, pipe.image_encoder.dtype)).image_embeds


def decoder_images(image: Image.Image | list[Image.Image], call: Call) -> Tensor:
    """The centre of each image at the decoder's size, [B, 3, H, W] in [-1, 1]."""
    images = [image] if isinstance(image, Image.Image) else image
    fitted = [ImageOps.fit(on_white(i), (call.width, call.height), Image.Resampling.BICUBIC) for i in images]
    return normalize(torch.stack([to_uint8_tensor(i) for i in fitted]))
