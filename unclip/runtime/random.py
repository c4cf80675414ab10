"""Counter-based random numbers: a number is a function of (seed, stream, example index, element) only.

An example has the same numbers in any batch, on any process and after any resume, and a batch's numbers are made by a few
operations on its device (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). In place of their
ciphers a counter goes through three rounds of 32-bit multiply and xorshift ("triple32" of hash-prospector, Wellons 2018).

All arithmetic is in integers without overflow, up to one conversion to float32 at the end. Therefore uniforms, integers
and normals are bitwise the same on CPU and GPU, eager and compiled. Nothing here reads a value back to the host.
"""

# B examples, E elements of each, K = 2 keys of 32 bits

import hashlib
import math
from enum import IntEnum, unique
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

_MASK = 2**32 - 1
_UNIFORM_BITS = 24  # of a float32 in [0, 1)

# The inverse of the normal distribution function: |z| at tail numbers m = 2^octave (1 + segment / 128), octave < 24, where
# P(|Z| > |z|) = (m + 1/2) / 2^24
_TAIL_BITS, _SEGMENT_BITS = 24, 7
_PLACE_BITS = 23 - _SEGMENT_BITS  # of a float32's mantissa: the place within a segment
_NORMAL_BITS = 22  # a normal is a multiple of 2^-22


@unique
class Stream(IntEnum):
    """What a random number is for. Different streams of one seed are independent.

    Those below `SCALARS` are one number an example: the columns of `scalars`.
    """

    DROP_BOTH = 0
    EMBEDDING_NOISE_LEVEL = 1
    TIMESTEP = 2
    DROP_IMAGE = 3
    DROP_TEXT = 4
    HOLE_X = 5
    HOLE_Y = 6
    HOLE_WIDTH = 7
    HOLE_HEIGHT = 8
    HOLE_EVERYTHING = 9
    EMBEDDING_SOURCE = 10
    EMBEDDING_SAMPLE = 11
    DROP_DRAFT = 12
    DROP_STYLE = 13
    SCENE_SIZE = 14
    SCENE_SHRINK = 15
    NOISE = 16
    EMBEDDING_NOISE = 17
    SCENE_PLACE = 19
    SCENE_BACKGROUND = 20


SCALARS = 16


def uniform(seed: int, stream: int, indices: Tensor, *shape: int) -> Tensor:
    """float32 numbers [*indices.shape, *shape] in [0, 1), multiples of 2^-24.

    Args:
        seed: Any integer.
        stream: What the numbers are for (`Stream`).
        indices: int64 example numbers of any shape.
        shape: Of the elements of one example; none for a single number.
    """
    return _to_unit(_words(seed, stream, indices, shape))


def scalars(seed: int, indices: Tensor) -> Tensor:
    """float32 [*indices.shape, SCALARS] in [0, 1): column s equals `uniform(seed, s, indices)`."""
    keys = _stream_keys(seed, range(SCALARS), indices.device)  # [SCALARS, K]
    return _to_unit(_elements(_example_keys(keys, indices[..., None]), ()))


def integers(seed: int, stream: int, indices: Tensor, *shape: int, below: int) -> Tensor:
    """int64 numbers [*indices.shape, *shape] in [0, below), of probabilities that differ by at most 2^-32.

    Arguments are as for `uniform`. Raises ValueError where `below` is not in [1, 2^31].
    """
    if not 1 <= below <= 2**31:
        raise ValueError(f"below must be from 1 to 2^31, got {below}")
    return _words(seed, stream, indices, shape) * below >> 32


def normal(seed: int, stream: int, indices: Tensor, *shape: int) -> Tensor:
    """Standard normal float32 numbers [*indices.shape, *shape], multiples of 2^-22 of at most 5.35.

    By the inverse of the distribution function, linear between 3,073 tabulated points that are dense in the tails, with an
    error below 1e-4: in integers, for the last bits of logarithms and cosines (Box-Muller) differ between devices.
    Arguments are as for `uniform`.
    """
    words = (_words(seed, stream, indices, shape) >> 31 - _TAIL_BITS).to(torch.int32)  # the sign's bit, and the tail's
    ends = _normal_table(words.device)
    # exact as a float32, whose bits are in order: exponent and first mantissa bits number the segment, the rest is the place
    tail = (words & (2**_TAIL_BITS - 1)).to(torch.float32).view(torch.int32)
    segment = ((tail >> _PLACE_BITS) - (127 << _SEGMENT_BITS)).clamp_min(0)
    start = ends[segment]
    magnitude = start + ((ends[segment + 1] - start) * (tail & (2**_PLACE_BITS - 1)) >> _PLACE_BITS)
    return torch.where(words >> _TAIL_BITS == 0, magnitude, -magnitude).to(torch.float32) * 2**-_NORMAL_BITS


# ---------------------------------------------------------------------------------------------- bits


def _words(seed: int, stream: int, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """int64 numbers [*indices.shape, *shape] in [0, 2^32)."""
    return _elements(_example_keys(_stream_keys(seed, (int(stream),), indices.device)[0], indices), shape)


def _example_keys(keys: Tensor, indices: Tensor) -> Tensor:
    """Keys [..., K] of examples `indices` [...] by the `keys` of their streams; of one stream no two below 2^32 are equal."""
    low, high = indices[..., None] & _MASK, indices[..., None] >> 32 & _MASK
    first, second, last = _ROUNDS
    return _finish(_multiply(_multiply(_multiply(low ^ keys, first) ^ high, second), last))


def _elements(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """int64 numbers [..., *shape] in [0, 2^32) of `keys` [..., K]."""
    counters = torch.arange(math.prod(shape), device=keys.device).view(shape) * 0x9E3779B1 & _MASK
    first_key, second_key = keys.view(*keys.shape[:-1], *[1] * len(shape), 2).unbind(-1)
    first, second, last = _ROUNDS
    return _finish(_multiply(_multiply(_multiply(counters ^ first_key, first) ^ second_key, second), last))


_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))


def _multiply(x: Tensor, by: tuple[int, int]) -> Tensor:
    """One round on int64 numbers `x` in [0, 2^32): xorshift, and a product modulo 2^32.

    The product of the factor as a signed 32-bit number stays in 64 bits: a signed overflow is undefined in C++, and a
    compiled kernel does make use of that.
    """
    shift, factor = by
    return (x ^ x >> shift) * (factor - 2**32 if factor >= 2**31 else factor) & _MASK


def _finish(x: Tensor) -> Tensor:
    return x ^ x >> 14


def _to_unit(words: Tensor) -> Tensor:
    return (words >> 32 - _UNIFORM_BITS).to(torch.float32) * 2**-_UNIFORM_BITS


# ---------------------------------------------------------------------------------------------- constants, once a device


@torch.compiler.assume_constant_result
def _stream_keys(seed: int, streams: range | tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [streams, K] in [0, 2^32)."""
    return _cached_stream_keys(seed, streams, device)


@lru_cache(maxsize=1024)
def _cached_stream_keys(seed: int, streams: range | tuple[int, ...], device: torch.device) -> Tensor:
    digests = (hashlib.sha256(f"{seed}, {stream}".encode()).digest() for stream in streams)
    return torch.tensor([[int.from_bytes(d[n : n + 4], "little") for n in (0, 4)] for d in digests], device="cpu").to(device)


@torch.compiler.assume_constant_result
def _normal_table(device: torch.device) -> Tensor:
    """int32 [3,073]: |z| in units of 2^-22 at the ends of the segments."""
    return _cached_normal_table(device)


@lru_cache
def _cached_normal_table(device: torch.device) -> Tensor:
    segments = 2**_SEGMENT_BITS
    numbers = [2**octave * (1 + n / segments) for octave in range(_TAIL_BITS) for n in range(segments)]
    tails = [(m + 0.5) / 2 ** (_TAIL_BITS + 1) for m in numbers] + [0.5]  # on one side
    ends = [round(-NormalDist().inv_cdf(p) * 2**_NORMAL_BITS) for p in tails]
    return torch.tensor(ends, dtype=torch.int32, device="cpu").to(device)
