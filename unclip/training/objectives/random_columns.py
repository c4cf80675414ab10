"""Names of an example's own random numbers: the columns of `random` [B, 16], uniform in [0, 1), and the noise streams.

A column serves one choice in a stage. Stages share columns where none uses both.
"""

DROP_BOTH = 0  # text and image embedding together; in a prior the text, which is all that is dropped
EMBEDDING_NOISE = 1  # how much noise the image embedding gets
NOISE_LEVEL = 1  # of an upsampler's low-resolution image; `upsamplers.degrade.corrupt` reads it too
TIMESTEP = 2
DROP_IMAGE = 3
DROP_TEXT = 4
HOLE = slice(5, 10)  # the rectangle that an inpainting decoder fills
USE_SAMPLED = 10  # an image embedding that the prior sampled in place of CLIP's
WHICH_SAMPLE = 11
DROP_DRAFT = 12
DROP_STYLE = 13
COLUMNS = 16

# Added to the run's seed, so that one example's two noises differ.
IMAGE_NOISE = 0  # of diffusion
CONDITION_NOISE = 1  # of the image embedding or of the low-resolution image
