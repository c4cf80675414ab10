"""The stages of the cascade, in the order of the data: text encoding, prior, decoder, 256 px and 1024 px upsampler.

Their arguments are the pipeline, for its networks and conventions (progress bar, callback, memory), and tensors.
"""

from .decoder import decode
from .image import encode_image
from .prior import sample_prior
from .text import TextCondition, encode_prompt
from .upsamplers import upsample_256, upsample_1024

__all__ = ["TextCondition", "decode", "encode_image", "encode_prompt", "sample_prior", "upsample_256", "upsample_1024"]
