"""Attention kernels, compilation, and the machine's fast dtype and memory layout."""

import logging
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..runtime import attention
from ..runtime.compiling import compiled, why_not
from ..runtime.precision import fast_dtype, slowdown
from .loading import Loading

logger = logging.getLogger(__name__)

SLOW = 1.5  # times as long as float32: a requested dtype that is slower logs a warning
CONVOLUTIONAL = ("decoder", "super_res_first", "super_res_last", "upsampler_1024")


class Acceleration(Loading):
    """`set_attention`, `compile` and diffusers' names for them."""

    _is_dtype_checked = False

    def set_attention(self, backend: str) -> None:
        """Run the prior's and the decoder's attention through "auto", "xformers", "sdpa" or "math".

        Raises ValueError, saying why, for one that cannot run on this machine.
        """
        for network in self._attending():
            attention.install(network, backend)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """diffusers' name for `set_attention("xformers")`, whose kernels accept unCLIP's masks; `attention_op` is ignored."""
        self.set_attention("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """diffusers' name for `set_attention("sdpa")`."""
        self.set_attention("sdpa")

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Does nothing: where attention is large, the kernels here never hold all of its scores."""

    def disable_attention_slicing(self) -> None:
        """Does nothing."""

    def compile(self) -> None:
        """Compile the decoder and the upsamplers by `torch.compile`.

        The compiler runs in the first call, and again for every new number of images, size and kind of guidance, a minute or
        more each time. Raises ValueError, saying why, where nothing can be compiled.
        """
        reason = why_not(self._execution_device)
        if reason:
            raise ValueError(f"the networks cannot be compiled: {reason}")
        self._require_in_memory("compiling")
        self._prepare()
        for network in self._networks(*CONVOLUTIONAL):
            compiled(network, self._execution_device)
        self._shared.compiled = True

    def _attending(self) -> list[ModelMixin]:
        """The networks whose attention kernels can be chosen."""
        return self._networks("prior", "text_proj", "decoder")

    def _networks(self, *names: str) -> list[ModelMixin]:
        """The networks of these names that this pipeline has."""
        found = (getattr(self, name, None) for name in names)
        return [network for network in found if network is not None]

    def _prepare(self) -> None:
        """Before the first image, set the machine's fast dtype, unless one was requested, and its memory layout."""
        if not self._shared.dtype_chosen:
            dtype = fast_dtype(self._execution_device)
            logger.info("running in %s on %s", dtype, self._execution_device)
            for network in self.components.values():
                if isinstance(network, nn.Module):
                    nn.Module.to(network, dtype)  # ModelMixin's `to` warns about modules that do not exist
            self._shared.dtype_chosen = True
        elif not self._is_dtype_checked and self._execution_device.type == "cpu":
            for dtype in {n.dtype for n in self._networks("prior", "decoder")} & {torch.bfloat16, torch.float16}:
                if (factor := slowdown(dtype)) > SLOW:
                    logger.warning("%s takes %.1f times as long as float32 on this CPU", dtype, factor)
        self._is_dtype_checked = True
        on_gpu = self._execution_device.type == "cuda"
        for network in self._networks(*CONVOLUTIONAL):
            # on a CPU in float32, diffusers' GroupNorms lose as much time in this layout as the convolutions gain
            if on_gpu or network.dtype.itemsize == 2 or not attention.is_stock(network):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # a wrapper without the types of nn.Module.to
