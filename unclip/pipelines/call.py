"""The state of one call of a pipeline, for its stages."""

# B images

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.sampling import Generators, Scheduler
from .distilled import Distilled
from .settings import MAX_IMAGES, SamplingSettings
from .sizes import Extent

if TYPE_CHECKING:
    from .base import UnCLIPBase


@dataclass
class Call:
    """Settings, random streams, sizes, and the decoder's sampler and options, shared by the stages of one call."""

    settings: SamplingSettings
    generator: Generators
    extent: Extent = field(default_factory=Extent)
    scheduler: Scheduler | None = None  # of the decoder
    distilled: Distilled | None = None  # replaces the full decoder
    eta: float = 0.0  # of the decoder's DDIM
    clip_guidance: float = 0.0  # of the decoder
    batch: int = MAX_IMAGES  # images that a stage samples at once

    @property
    def decoder_scheduler(self) -> Scheduler:
        """The decoder's sampler. Raises ValueError for a call without a decoder."""
        if self.scheduler is None:
            raise ValueError("this call has no decoder")
        return self.scheduler

    @property
    def last(self) -> int:
        """The last stage that runs: 0 decoder, 1 64 -> 256, 2 256 -> 1024."""
        return self.extent.last

    @property
    def height(self) -> int:
        """The height of the decoder's images in pixels."""
        return self.extent.height

    @property
    def width(self) -> int:
        """The width of the decoder's images in pixels."""
        return self.extent.width

    def with_same_noise(self, count: int, batch: int) -> "Call":
        """This call for `count` images with copies of its one random stream, `batch` of them at once."""
        if not isinstance(self.generator, torch.Generator):
            raise ValueError("the same noise for all images needs one generator")
        return replace(self, generator=copies(self.generator, count), batch=batch)


def in_batches(pipe: "UnCLIPBase", stage: Callable[..., Tensor], call: Call, **rows: Any) -> Iterator[Tensor]:
    """The outputs of a `stage` for `rows`, with an entry for each image or None, `call.batch` images at a time.

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
        generator = call.generator[some] if isinstance(call.generator, list) else call.generator
        yield stage(pipe, **batch, call=replace(call, generator=generator))


def joined(batches: Iterable[Any]) -> Any:
    """Batches of images, all tensors, arrays or lists, as one."""
    first, *others = batches
    if not others:
        return first
    if isinstance(first, list):
        return sum(others, first)
    return torch.cat([first, *others]) if isinstance(first, Tensor) else np.concatenate([first, *others])


def fresh_generator() -> torch.Generator:
    """A generator with a seed from the operating system; torch's global random stream is not used."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def copies(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """`count` generators that all continue from the state of `generator`."""
    return [torch.Generator(generator.device).set_state(generator.get_state()) for _ in range(count)]
