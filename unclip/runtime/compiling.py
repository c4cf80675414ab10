"""`torch.compile`, on machines with a compiler."""

import importlib.util
import os
import shutil
import time
from pathlib import Path

import torch
from torch import nn

COMPILERS = ("g++", "clang++")
LINKED = 10  # seconds after which an empty library is not being linked any more


def why_not(device: torch.device | str = "cpu") -> str | None:
    """Why networks cannot be compiled for `device`, and what to do; None where they can."""
    kind = torch.device(device).type
    if kind == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
    if kind != "cpu":
        return f"there is no compiler for the device {kind}"
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        return None
    return f"there is no C++ compiler ({named or ' or '.join(COMPILERS)}): install one (apt install g++) or name it by CXX"


def compiled(network: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """`network`, compiled at its next call, once for each shape of its inputs; on CUDA with CUDA graphs."""
    if network._compiled_call_impl is None:
        forget_broken()
        # shapes are constant in a loop: one graph for each is faster than a dynamic one
        network.compile(dynamic=False, mode="reduce-overhead" if torch.device(device).type == "cuda" else None)
    return network


def forget_broken() -> None:
    """Delete the empty libraries that a killed compilation leaves in torch's cache, which torch would load."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second to import

    for library in Path(cache_dir()).glob("*/*.so"):
        found = library.stat()
        if not found.st_size and time.time() - found.st_mtime > LINKED:
            library.unlink(missing_ok=True)
