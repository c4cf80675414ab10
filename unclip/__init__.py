"""unCLIP: text to image through CLIP image embeddings, after DALL·E 2 (arXiv 2204.06125).

from unclip import UnCLIPPipeline
UnCLIPPipeline.from_pretrained("emoji")("a rocket").images[0].save("rocket.png")
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

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


moved.install()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
