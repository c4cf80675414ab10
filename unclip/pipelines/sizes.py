"""The image sizes of a checkpoint's stages, and the multiples that the sides of its images have to be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers.models.modeling_utils import ModelMixin
from PIL import Image


@dataclass(frozen=True)
class Extent:
    """The stages that a call runs: the last one (0 decoder, 1 256 px, 2 1024 px) and the decoder's height and width."""

    last: int = 0
    height: int = 0
    width: int = 0


class Sizes:
    """The sizes in pixels of the networks of a cascade: decoder, then the upsamplers."""

    def __init__(self, networks: Sequence[ModelMixin]):
        self.networks = list(networks)
        self.sizes = [int(network.config["sample_size"]) for network in self.networks]

    def last_stage(self, size: int | None) -> tuple[int, int]:
        """The stage of `size` (None: the largest) and that size. Raises ValueError for a size without a stage."""
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size must be one of {', '.join(map(str, self.sizes))}, got {size!r}")
        return self.sizes.index(size), size

    def extent(self, size: int | None, height: int | None, width: int | None) -> Extent:
        """Raises ValueError, naming the nearest valid ones, for sides that the stages' strides do not divide."""
        last, size = self.last_stage(size)
        enlargement, step = size // self.sizes[0], self.side_step(last)
        sides: list[int] = []
        for name, side in (("height", height), ("width", width)):
            side = size if side is None else side
            if not isinstance(side, int) or side < 1 or side % step:
                below = math.floor(side / step) if isinstance(side, int | float) and math.isfinite(side) else size // step
                near = f"the nearest are {below * step} and {(below + 1) * step}" if below > 0 else f"the nearest is {step}"
                raise ValueError(f"{name} must be a multiple of {step} at size {size}, got {side!r}; {near}")
            sides.append(side // enlargement)
        return Extent(last, sides[0], sides[1])

    def side_step(self, last: int) -> int:
        """The number that the sides of an image of stage `last` must be multiples of."""
        used = zip(self.networks[: last + 1], self.sizes, strict=False)
        return math.lcm(*(stride(network) * (self.sizes[last] // size) for network, size in used))

    def sides_like(self, image: Image.Image, size: int | None) -> tuple[int, int]:
        """Height and width that the stages support, of about `size` by `size` pixels, nearest to an image's proportions.

        Raises ValueError for an image so narrow that this would take more than twice as many pixels.
        """
        last, size = self.last_stage(size)
        step = self.side_step(last)
        stretch = math.sqrt(image.height / image.width)
        height, width = (max(round(side / step), 1) * step for side in (size * stretch, size / stretch))
        if height * width > 2 * size * size:
            narrow = f"an image of {image.width}x{image.height} pixels is too narrow"
            raise ValueError(f"{narrow} to be drawn at about {size}x{size}; cut it, or choose a larger size")
        return height, width


def stride(network: ModelMixin) -> int:
    """The number that a network's height and width must be multiples of."""
    return getattr(network, "stride", None) or 2 ** (len(network.config["block_out_channels"]) - 1)
