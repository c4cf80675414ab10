"""Which dtype a machine is fast in, and which device it has."""

import torch


def best_device() -> torch.device:
    """The first of cuda, mps, cpu that the machine has."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def working_dtype(network: torch.nn.Module) -> torch.dtype:
    """What a network's samples are kept in between its steps: float64 beside float64 weights, else float32."""
    return torch.float64 if network.dtype == torch.float64 else torch.float32


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (CUDA from Ampere, CPUs with AVX512-BF16 or AMX), else float32."""
    device = torch.device(device) if device is not None else best_device()
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32
