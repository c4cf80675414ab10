"""One call of a pipeline, as its stages see it."""

# B images

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.sampling import Generators
from .distilled import Distilled
from .settings import MAX_IMAGES, SamplingSettings
from .sizes import Extent

if TYPE_CHECKING:
    from .base import UnCLIPBase


@dataclass
class Call:
    """What the stages of one call share: settings, random streams, sizes, and the decoder's sampler."""

    settings: SamplingSettings
    generator: Generators
    extent: Extent = field(default_factory=Extent)
    scheduler: Any = None  # of the decoder
    distilled: Distilled | None = None  # takes the full decoder's place
    batch: int = MAX_IMAGES  # images that a stage samples at once

    @property
    def last(self) -> int:
        """The last stage that runs: 0 decoder, 1 64 -> 256, 2 256 -> 1024."""
        return self.extent.last

    @property
    def height(self) -> int:
        """Of the decoder's images."""
        return self.extent.height

    @property
    def width(self) -> int:
        """Of the decoder's images."""
        return self.extent.width

    def with_same_noise(self, count: int, batch: int) -> "Call":
        """This call for `count` images that all get the same random stream, `batch` of them at once."""
        return replace(self, generator=copies(self.generator, count), batch=batch)


def in_batches(pipe: "UnCLIPBase", stage: Callable[..., Tensor], call: Call, **rows: Any) -> Iterator[Tensor]:
    """What a `stage` makes of `rows`, which have an entry for each image or are None, `call.batch` images at a time.

    Once the call is interrupted, batches that the stage has not begun are left out.
    """
    count, was_interrupted = len(next(iter(rows.values()))), pipe.interrupt
    if count <= call.batch:
        yield stage(pipe, **rows, call=call)
        return
    for n in range(0, count, call.batch):
        if pipe.interrupt and not was_interrupted:
            return
        some = slice(n, n + call.batch)
        batch = {name: None if value is None else value[some] for name, value in rows.items()}
        yield stage(pipe, **batch, call=replace(call, generator=call.generator[some]))


def joined(batches: Iterable) -> Any:
    """Batches of images as one, be they tensors, arrays or lists."""
    first, *others = batches
    if not others:
        return first
    if isinstance(first, list):
        return sum(others, first)
    return torch.cat([first, *others]) if isinstance(first, Tensor) else np.concatenate([first, *others])


def fresh_generator() -> torch.Generator:
    """A generator seeded by the machine's entropy, which leaves torch's global random stream as it was."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def copies(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """`count` generators that all continue from the state of `generator`."""
    return [torch.Generator(generator.device).set_state(generator.get_state()) for _ in range(count)]
