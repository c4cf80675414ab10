"""The fastest dtype and the best device of a machine."""

from functools import cache

import torch
import torch.nn.functional as F

from .profiling import fastest


def best_device() -> torch.device:
    """The first of cuda, mps, cpu that the machine has."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def working_dtype(network: torch.nn.Module) -> torch.dtype:
    """The dtype of a network's samples between its steps: float64 for float64 weights, else float32."""
    return torch.float64 if network.dtype == torch.float64 else torch.float32


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast (CUDA from Ampere, CPUs with AMX or a fast AVX512-BF16), else float32.

    AVX512-BF16 without AMX is twice as fast as float32 on AMD's processors and half as fast on Intel's (where a virtual machine
    hides AMX), so there both are timed.
    """
    device = torch.device(device) if device is not None else best_device()
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.float32
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if amx or (avx512 and slowdown(torch.bfloat16) < 1) else torch.float32


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a small convolution takes on this CPU in `dtype`; measured at the first call.

    In channels_last, as the networks are run.
    """

    def taken(dtype: torch.dtype) -> float:
        x, kernel = (
            torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last) for shape in ((1, 64, 32, 32), (64, 64, 3, 3))
        )
        return fastest(lambda: F.conv2d(x, kernel, padding=1), x.device)

    return taken(dtype) / taken(torch.float32)
