"""unCLIP: text to image through CLIP image embeddings, after DALL·E 2 (arXiv 2204.06125).

from unclip import UnCLIPPipeline
UnCLIPPipeline.from_pretrained("emoji")("a rocket").images[0].save("rocket.png")
"""

import ctypes
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .io import moved

if TYPE_CHECKING:
    from decoder import UnCLIPTextProjModel

    from .clip.model import CLIP
    from .diffusion.scheduler import UnCLIPScheduler
    from .pipelines import (
        UnCLIPImageVariationPipeline,
        UnCLIPInpaintPipeline,
        UnCLIPInterpolationPipeline,
        UnCLIPPCAPipeline,
        UnCLIPPipeline,
        UnCLIPPriorPipeline,
        UnCLIPTextDiffPipeline,
    )

try:
    __version__ = version("unclip")
except PackageNotFoundError:  # a bare clone, not installed
    __version__ = "0+clone"

__all__ = [
    "CLIP",
    "UnCLIPImageVariationPipeline",
    "UnCLIPInpaintPipeline",
    "UnCLIPInterpolationPipeline",
    "UnCLIPPCAPipeline",
    "UnCLIPPipeline",
    "UnCLIPPriorPipeline",
    "UnCLIPScheduler",
    "UnCLIPTextDiffPipeline",
    "UnCLIPTextProjModel",
    "__version__",
]

# torch takes seconds to import: `unclip --help` shall not wait for it
_HOMES = {
    "CLIP": "unclip.clip",
    "UnCLIPImageVariationPipeline": "unclip.pipelines",
    "UnCLIPInpaintPipeline": "unclip.pipelines",
    "UnCLIPInterpolationPipeline": "unclip.pipelines",
    "UnCLIPPCAPipeline": "unclip.pipelines",
    "UnCLIPPipeline": "unclip.pipelines",
    "UnCLIPPriorPipeline": "unclip.pipelines",
    "UnCLIPScheduler": "unclip.diffusion.scheduler",
    "UnCLIPTextDiffPipeline": "unclip.pipelines",
    "UnCLIPTextProjModel": "decoder",
}


def _has_gpu_driver() -> bool:
    """Whether a CUDA or ROCm driver library can be loaded; asked without importing torch."""
    for name in ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


# diffusers imports xformers wherever it is installed, and without a GPU that only prints a warning: hide it there.
# Not from a diffusers that was imported first, which has noted that xformers is there and would miss it.
if not {"xformers", "diffusers"} & set(sys.modules) and not _has_gpu_driver():
    sys.modules["xformers"] = None


moved.install()


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
