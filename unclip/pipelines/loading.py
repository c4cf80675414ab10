"""How pipelines come into being: from folders and the Hub, and from each other."""

import inspect
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import DiffusionPipeline

from decoder import Decoder
from upsamplers import Upsampler

from ..io.checkpoints import check_folder, holds_network, import_own_modules, ready_to_share, resolve
from ..io.moved import CLASSES, class_module
from .distilled import FILE as DISTILLED
from .distilled import Distilled
from .lora import LoRAMixin
from .residency import Residency

# What diffusers' `from_pretrained` takes for the Hub's client.
_HUB = ("cache_dir", "token", "local_files_only", "force_download")


@dataclass
class Shared:
    """What pipelines over the same networks know of them together, whichever of them it was told."""

    dtype_chosen: bool = False  # or the first call chooses
    compiled: bool = False


class Loading(LoRAMixin, DiffusionPipeline):
    """`from_pretrained`, `from_pipe`, `to` and what they rest on."""

    _residency: Residency | None = None  # with `low_memory`: which networks' weights are in memory
    _distilled: Distilled | None = None  # the decoder in few steps, where the model's folder has it

    @classmethod
    def component_names(cls) -> list[str]:
        """The names of a pipeline's parts, in the order of the data."""
        return [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "defaults")]

    @classmethod
    def required_components(cls) -> list[str]:
        """The names of the parts without which there is no pipeline."""
        parameters = inspect.signature(cls.__init__).parameters
        return [
            n
            for n in cls.component_names()
            if parameters[n].default is inspect.Parameter.empty and n not in cls._optional_components
        ]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike = "emoji",
        *,
        attention: str = "auto",
        low_memory: bool = False,
        **kwargs,
    ) -> Self:
        """The shipped model ("emoji"), a folder, or a Hub id (its safetensors and configurations only).

        `attention` is "auto", "xformers", "sdpa" or "math"; `revision`, `cache_dir`, `token`, `local_files_only` and
        `force_download` are for the Hub, `variant` is a suffix of the weights' files, as "fp16". With `low_memory` each
        network's weights are read from its file when its stage begins, and let go when the next begins. Raises ValueError,
        in one line, for an unknown name and for a folder with a missing, truncated or pickled file.
        """
        hub = {n: kwargs.pop(n) for n in _HUB if n in kwargs}
        folder = resolve(pretrained_model_name_or_path, kwargs.pop("revision", None), **hub)
        given = {n for n in kwargs if n in cls.component_names()}
        index = check_folder(folder, given, kwargs.get("variant"))
        missing = [n for n in cls.required_components() if index.get(n, [None])[0] is None and n not in kwargs]
        if missing:
            raise ValueError(f"{folder / 'model_index.json'} names no {missing[0]}, and {cls.__name__} needs one")
        index = cls._moved(index)
        import_own_modules(index)
        kwargs.setdefault("use_safetensors", True)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)  # diffusers' new name and its old one
        residency = None
        if low_memory:
            parts = {n: index[n] for n in cls.component_names() if n not in given and holds_network(folder / n)}
            residency = Residency(folder, parts, dtype, kwargs.get("variant"))
            kwargs |= residency.networks
        pipe = super().from_pretrained(folder, **kwargs, **({"dtype": dtype} if dtype else {}))
        pipe._shared.dtype_chosen, pipe._residency = dtype is not None, residency
        if (folder / DISTILLED).is_file() and "decoder" in cls.component_names() and "decoder" not in given:
            pipe._distilled = Distilled.load(folder / DISTILLED)
        if attention != "auto":
            pipe.set_attention(attention)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, revision: str | None = None, **kwargs) -> str:
        """Fetch a model's configurations and safetensors, nothing else; -> the folder."""
        return str(resolve(pretrained_model_name, revision, **{n: kwargs[n] for n in _HUB if n in kwargs}))

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As diffusers', with the parts that moved, or that only another pipeline has, told apart."""
        found = super().load_config(*args, **kwargs)
        return (cls._moved(found[0]), *found[1:]) if isinstance(found, tuple) else cls._moved(found)

    @classmethod
    def _moved(cls, index: dict) -> dict:
        known = {*cls.component_names(), "defaults"}
        index = {k: v for k, v in index.items() if k.startswith("_") or k in known}
        return {k: [CLASSES.get(v[1], class_module(*v)), v[1]] if isinstance(v, list | tuple) else v for k, v in index.items()}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """This kind of pipeline over another one's networks, which are shared, not copied.

        `kwargs` give or replace parts, and may set `dtype`. Raises ValueError for a part that `pipeline` lacks.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        parts = {n: kwargs.pop(n, getattr(pipeline, n, None)) for n in cls.component_names()}
        missing = [n for n in cls.required_components() if parts[n] is None]
        if missing:
            raise ValueError(f"{cls.__name__} needs a {missing[0]}, and {type(pipeline).__name__} has none")
        defaults = kwargs.pop("defaults", pipeline.config.get("defaults"))
        if kwargs:
            raise ValueError(f"{next(iter(kwargs))!r} is no part of {cls.__name__}: {', '.join(cls.component_names())}")
        pipe = cls(**parts, defaults=defaults)
        pipe._shared = getattr(pipeline, "_shared", Shared(dtype_chosen=True))
        pipe._residency = getattr(pipeline, "_residency", None)
        if parts.get("decoder") is not None and parts["decoder"] is getattr(pipeline, "decoder", None):
            pipe._distilled = getattr(pipeline, "_distilled", None)
        pipe._progress_bar_config = dict(getattr(pipeline, "_progress_bar_config", {}))
        return pipe.to(dtype) if dtype else pipe

    def to(self, *args, **kwargs) -> Self:
        """As `DiffusionPipeline.to`; a dtype given here is kept, otherwise the first call takes the machine's fastest."""
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        models = logging.getLogger("diffusers.models.modeling_utils")
        level = models.level
        models.setLevel(logging.ERROR)  # it warns of layers to keep in float32 for every network, also those without any
        try:
            if self._residency is None:
                super().to(*args, **kwargs)
            else:
                self._to_of_shells(*args, **kwargs)
        finally:
            models.setLevel(level)
        self._shared.dtype_chosen |= dtype is not None
        return self

    def _to_of_shells(self, *args, **kwargs) -> None:
        """`to` under `low_memory`: weights come to the device when they are read."""
        kwargs.pop("silence_dtype_warnings", None)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        self._residency.only()
        self._residency.device = device or self._residency.device
        for name, part in self.components.items():
            if isinstance(part, torch.nn.Module):
                part.to(dtype=dtype, device=None if name in self._residency.networks else device)

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return super().device if self._residency is None else self._residency.device

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`, with the distilled decoder where there is one, and without the paths that
        the components were once loaded from.
        """
        self._have(*self.components)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._have()
        ready_to_share(Path(save_directory))
        if self._distilled is not None:
            self._distilled.save(Path(save_directory) / DISTILLED)

    def _have(self, *names: str) -> None:
        """Under `low_memory`: have these networks' weights in memory, and no others'.

        Under model offload: have no others' on the device. diffusers lets go of a network when the one after it runs, which a
        call may do without.
        """
        if self._residency is not None:
            self._residency.only(*names)
            if self._distilled is not None and "decoder" not in names:
                self._distilled.forget()
        for hook in getattr(self, "_all_hooks", []):
            if not any(hook.model is getattr(self, name) for name in names):
                hook.offload()

    def _in_memory(self, what: str) -> None:
        if self._residency is not None:
            raise ValueError(f"{what} needs the weights to stay in memory: load the model without low_memory")

    def load_lora_weights(self, *args, **kwargs) -> None:
        self._in_memory("a LoRA adapter")
        super().load_lora_weights(*args, **kwargs)

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        self._in_memory("model offload")
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        self._in_memory("sequential offload")
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "leaf_level",
        *args,
        **kwargs,
    ) -> None:
        """As `DiffusionPipeline.enable_group_offload`, by single layers unless told otherwise.

        Raises ValueError for "block_level" where a U-Net is this package's own: it runs its blocks' parts, not the blocks.
        """
        self._in_memory("group offload")
        nested = [n for n, c in self.components.items() if isinstance(c, Decoder | Upsampler)]
        if offload_type != "leaf_level" and nested:
            raise ValueError(f"offload_type {offload_type!r} does not fit {', '.join(nested)}: take 'leaf_level'")
        super().enable_group_offload(onload_device, offload_device, offload_type, *args, **kwargs)
