"""Weights stored in 8 bits: int8 with a scale for each output channel, dequantised when a network is loaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

STORAGE = "storage"  # the key of a file's metadata that says how it is stored
INT8 = "int8"
SCALE = ".int8_scale"  # ends the name of the scales of a tensor
SMALLEST = 4096  # elements; smaller tensors, vectors and tensors of one row are stored as float16
WEIGHTS = "diffusion_pytorch_model"
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def quantise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for 8-bit storage: matrices [O, ...] as int8 with float32 scales [O], other floats as float16.

    The scale of an output channel is the largest magnitude in it over 127, so an error is at most half a scale.
    """
    stored = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            stored[name] = tensor.contiguous()
        elif tensor.ndim < 2 or len(tensor) == 1 or tensor.numel() < SMALLEST:
            stored[name] = tensor.to(torch.float16).contiguous()
        else:
            rows = tensor.float().flatten(1)  # [O, I]
            scale = rows.abs().amax(1).clamp_min(1e-12) / 127
            stored[name] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape).contiguous()
            stored[name + SCALE] = scale
    return stored


def dequantise(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, in float32 where it was quantised, of what `quantise` answered."""
    state = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        state[name] = tensor if scale is None else tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
    return state


def is_int8(path: Path) -> bool:
    """Whether a .safetensors file holds weights in 8 bits."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(STORAGE) == INT8


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, however it is stored."""
    state = load_file(path)
    return dequantise(state) if is_int8(path) else state


def store_in_8_bits(path: Path) -> None:
    """Rewrite a .safetensors file in 8 bits."""
    stored = quantise(read_weights(path))
    partial = path.with_name(path.name + ".partial")
    save_file(stored, partial, {STORAGE: INT8})
    partial.replace(path)


class Int8Storage(ModelMixin, ConfigMixin):
    """A diffusers model whose `from_pretrained` also reads weights in 8 bits.

    Subclasses name `ModelMixin` among their bases too: diffusers loads a component's class only from a module that has it.
    """

    config_name = "config.json"  # type: ignore[assignment]  # ConfigMixin declares it None, ModelMixin a string

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """As diffusers', from a folder or a Hub id. Weights in 8 bits arrive in `torch_dtype` (`dtype`), float32 by default."""
        if pretrained_model_name_or_path is None:
            raise ValueError("from_pretrained needs a folder or a Hub id")
        folder, given = Path(pretrained_model_name_or_path), dict(kwargs)
        subfolder = given.pop("subfolder", None) or ""
        variant = given.pop("variant", None)
        if not folder.is_dir():
            hub = {name: given[name] for name in _HUB if given.get(name) is not None}
            wanted = [os.path.join(subfolder, "config.json"), os.path.join(subfolder, "*.safetensors*")]
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=wanted, **hub))
        file = folder / subfolder / (f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors")
        if not file.is_file() or not is_int8(file):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = cast(dict[str, Any], cls.load_config(folder / subfolder))  # a tuple only if asked for more
        network = cast(Self, cls.from_config(config))
        network.load_state_dict(read_weights(file))
        network.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        dtype = given.get("torch_dtype") or given.get("dtype") or torch.float32
        return torch.nn.Module.to(network, dtype if isinstance(dtype, torch.dtype) else torch.float32).eval()
