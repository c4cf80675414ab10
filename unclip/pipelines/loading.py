"""Loading pipelines from folders, the Hub and other pipelines; saving and offloading."""

import inspect
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from decoder import Decoder
from upsamplers import Upsampler

from ..io.checkpoints import (
    check_folder,
    holds_network,
    import_own_modules,
    ready_to_share,
    resolve,
)
from ..io.hub import AXES_FILE, CARD, DISTILLED_FILE
from ..io.moved import CLASSES, class_module
from .distilled import Distilled
from .hub import PUSH_OPTIONS, push_folder
from .lora import LoRAMixin
from .residency import Residency

# Arguments of diffusers' `from_pretrained` for the Hub's client.
_HUB = ("cache_dir", "token", "local_files_only", "force_download")


@dataclass
class Shared:
    """The state of networks that several pipelines share."""

    dtype_chosen: bool = False  # otherwise the first call chooses
    compiled: bool = False


class Loading(LoRAMixin, DiffusionPipeline):
    """`from_pretrained`, `from_pipe`, `to`, saving and offloading."""

    _shared: Shared
    _all_hooks: list[Any]  # of accelerate's model offload, set by diffusers
    _progress_bar_config: dict[str, Any]  # set by diffusers
    _residency: Residency | None = None  # with `low_memory`: the networks whose weights are in memory
    _distilled: Distilled | None = None  # the distilled decoder, if the model's folder has one
    _extra_files: Mapping[str, bytes] = {}  # of the model's folder: name -> content

    @classmethod
    def component_names(cls) -> list[str]:
        """The names of a pipeline's components, in the order of the data."""
        return [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "defaults")]

    @classmethod
    def required_components(cls) -> list[str]:
        """The names of the components that are not optional."""
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
        **kwargs: Any,
    ) -> Self:
        """The shipped model ("emoji"), a folder, or a Hub id (its safetensors and configurations only).

        `attention` is "auto", "xformers", "sdpa" or "math"; `revision`, `cache_dir`, `token`, `local_files_only` and
        `force_download` are for the Hub, `variant` is a suffix of the weights' files, as "fp16", and `subfolder` is where in
        the folder or repository the model is. With `low_memory` each network's weights are loaded from its file when its
        stage begins, and freed when the next begins. Raises ValueError, in one line, for an unknown name and for a folder
        with a missing, truncated or pickled file.
        """
        hub = {n: kwargs.pop(n) for n in _HUB if n in kwargs}
        where = {"variant": kwargs.get("variant"), "subfolder": kwargs.pop("subfolder", None)}
        folder = resolve(os.fspath(pretrained_model_name_or_path), kwargs.pop("revision", None), **where, **hub)
        given = {n for n in kwargs if n in cls.component_names()}
        index = check_folder(folder, given, kwargs.get("variant"))
        missing = [n for n in cls.required_components() if index.get(n, [None])[0] is None and n not in kwargs]
        if missing:
            raise ValueError(f"{folder / 'model_index.json'} names no {missing[0]}, and {cls.__name__} needs one")
        index = cls._present_index(index)
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
        if (folder / DISTILLED_FILE).is_file() and "decoder" in cls.component_names() and "decoder" not in given:
            pipe._distilled = Distilled.load(folder / DISTILLED_FILE)
        extra = [CARD] if given & {"text_encoder", "image_encoder"} else [CARD, AXES_FILE]  # the axes are of their embeddings
        pipe._extra_files = {name: (folder / name).read_bytes() for name in extra if (folder / name).is_file()}
        if attention != "auto":
            pipe.set_attention(attention)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, revision: str | None = None, **kwargs: Any) -> str:
        """Fetch a model's configurations and safetensors, nothing else; -> the folder."""
        names = (*_HUB, "variant", "subfolder")
        return str(resolve(os.fspath(pretrained_model_name), revision, **{n: kwargs[n] for n in names if n in kwargs}))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', with the present modules of classes that moved, and without other pipelines' components."""
        found = super().load_config(*args, **kwargs)
        return (cls._present_index(found[0]), *found[1:]) if isinstance(found, tuple) else cls._present_index(found)

    @classmethod
    def _present_index(cls, index: dict[str, Any]) -> dict[str, Any]:
        known = {*cls.component_names(), "defaults"}
        index = {k: v for k, v in index.items() if k.startswith("_") or k in known}
        return {k: [CLASSES.get(v[1], class_module(*v)), v[1]] if isinstance(v, list | tuple) else v for k, v in index.items()}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of this class with the networks of another one, which are shared, not copied.

        `kwargs` add or replace components, and may set `dtype`. Raises ValueError for a component that `pipeline` lacks.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        parts = {n: kwargs.pop(n, getattr(pipeline, n, None)) for n in cls.component_names()}
        missing = [n for n in cls.required_components() if parts[n] is None]
        if missing:
            raise ValueError(f"{cls.__name__} needs a {missing[0]}, and {type(pipeline).__name__} has none")
        defaults = kwargs.pop("defaults", pipeline.config.get("defaults"))
        if kwargs:
            raise ValueError(f"{next(iter(kwargs))!r} is no part of {cls.__name__}: {', '.join(cls.component_names())}")
        pipe = cls(**(parts | {"defaults": defaults}))
        pipe._shared = getattr(pipeline, "_shared", Shared(dtype_chosen=True))
        pipe._extra_files = getattr(pipeline, "_extra_files", {})
        pipe._residency = getattr(pipeline, "_residency", None)
        if parts.get("decoder") is not None and parts["decoder"] is getattr(pipeline, "decoder", None):
            pipe._distilled = getattr(pipeline, "_distilled", None)
        pipe._progress_bar_config = dict(getattr(pipeline, "_progress_bar_config", {}))
        return pipe.to(dtype) if dtype else pipe

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `DiffusionPipeline.to`; without a dtype given here, the first call sets the machine's fastest."""
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        models = logging.getLogger("diffusers.models.modeling_utils")
        level = models.level
        models.setLevel(logging.ERROR)  # it warns about layers to keep in float32 for every network, also those without any
        try:
            if self._residency is None:
                super().to(*args, **kwargs)
            else:
                self._move_resident(self._residency, *args, **kwargs)
        finally:
            models.setLevel(level)
        self._shared.dtype_chosen |= dtype is not None
        return self

    def _move_resident(self, residency: Residency, *args: Any, **kwargs: Any) -> None:
        """`to` with `low_memory`: weights are moved to the device when they are loaded."""
        kwargs.pop("silence_dtype_warnings", None)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        residency.only()
        residency.device = device or residency.device
        for name, part in self.components.items():
            if isinstance(part, torch.nn.Module):
                part.to(dtype=dtype, device=None if name in residency.networks else device)

    @property
    def device(self) -> torch.device:
        """The device of the pipeline's networks."""
        return super().device if self._residency is None else self._residency.device

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As `DiffusionPipeline.save_pretrained`: all files of the folder that this pipeline was loaded from, and no paths.

        Beside the components these are the distilled decoder, the model card and the principal axes. With `push_to_hub` the
        folder is sent when it is complete; `repo_id` (default: the folder's name), `private`, `token`, `commit_message`,
        `revision` and `create_pr` are for `push_folder`.
        """
        folder = Path(save_directory)
        to_hub = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        self._load_only(*self.components)
        try:
            super().save_pretrained(folder, *args, **kwargs)
        finally:
            self._load_only()
        ready_to_share(folder)
        if self._distilled is not None:
            self._distilled.save(folder / DISTILLED_FILE)
        for name, content in self._extra_files.items():
            (folder / name).write_bytes(content)
        if push_to_hub:
            push_folder(folder, to_hub.pop("repo_id", folder.name), **to_hub)

    def push_to_hub(  # noqa: PLR0913 - diffusers' signature
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
    ) -> str:
        """As `DiffusionPipeline.push_to_hub`, complete or not at all; -> the commit's address.

        `revision` is a branch, which is created if needed. Raises ValueError, in one line, for what the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return push_folder(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                subfolder=subfolder,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def _load_only(self, *names: str) -> None:
        """With `low_memory`, load the weights of these networks and free all others'.

        With model offload, offload all others. diffusers offloads a network when the next one runs, which may never happen in
        a call.
        """
        if self._residency is not None:
            self._residency.only(*names)
            if self._distilled is not None and "decoder" not in names:
                self._distilled.forget()
        for hook in getattr(self, "_all_hooks", []):
            if not any(hook.model is getattr(self, name) for name in names):
                hook.offload()

    def _require_in_memory(self, what: str) -> None:
        """Raises ValueError with `low_memory`."""
        if self._residency is not None:
            raise ValueError(f"{what} needs the weights to stay in memory: load the model without low_memory")

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        self._require_in_memory("a LoRA adapter")
        super().load_lora_weights(*args, **kwargs)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        self._require_in_memory("model offload")
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        self._require_in_memory("sequential offload")
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "leaf_level",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As `DiffusionPipeline.enable_group_offload`, with "leaf_level" as the default.

        Raises ValueError for "block_level" with this package's UNets, which call the layers of their blocks, not the blocks.
        """
        self._require_in_memory("group offload")
        nested = [n for n, c in self.components.items() if isinstance(c, Decoder | Upsampler)]
        if offload_type != "leaf_level" and nested:
            raise ValueError(f"offload_type {offload_type!r} does not fit {', '.join(nested)}: take 'leaf_level'")
        super().enable_group_offload(torch.device(onload_device), torch.device(offload_device), offload_type, *args, **kwargs)
