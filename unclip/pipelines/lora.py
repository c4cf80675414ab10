"""LoRA adapters (arXiv 2106.09685) on prior and decoder, through PEFT."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors import safe_open
from torch import Tensor, nn

from ..io.checkpoints import check_safetensors, resolve, save_tensors

WEIGHTS, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


class LoRAMixin(LoraBaseMixin):
    """Loading and saving; `set_adapters`, `unload_lora_weights`, `fuse_lora`, `get_list_adapters` … are diffusers'."""

    _lora_loadable_modules = ["prior", "decoder"]

    def load_lora_weights(  # type: ignore[override]  # LoraBaseMixin declares keyword arguments only
        self, source: str | Path | Mapping[str, Tensor], adapter_name: str = "default"
    ) -> None:
        """Add an adapter and activate it.

        Args:
            source: a `.safetensors` file, a folder or Hub id that holds one, or tensors by name ("prior.…", "decoder.…").
            adapter_name: its name for `set_adapters` and `delete_adapters`.

        Raises:
            ValueError: for a file that is missing or pickled, and for one whose tensors belong to neither network.
            ImportError: when PEFT is not installed.
        """
        if importlib.util.find_spec("peft") is None:
            raise ImportError("LoRA adapters need PEFT; install it with: pip install 'unclip[train]'")
        tensors, metadata = (dict(source), None) if isinstance(source, Mapping) else _read(source)
        names = sorted(name for name in self._lora_loadable_modules if any(k.startswith(f"{name}.") for k in tensors))
        unknown = [k for k in tensors if k.split(".")[0] not in names]
        if unknown or not names:
            raise ValueError(f"this is no adapter of a prior or a decoder: it holds {(unknown or ['nothing'])[0]!r}")
        networks = {}
        for name in names:
            network = getattr(self, name, None)
            if network is None:
                raise ValueError(f"the adapter is for a {name}, and {type(self).__name__} has none")
            networks[name] = network
        if adapter_name in {a for adapters in self.get_list_adapters().values() for a in adapters}:
            raise ValueError(f"there is an adapter named {adapter_name!r} already; unload it or choose another name")
        for name, network in networks.items():
            network.load_lora_adapter(tensors, prefix=name, adapter_name=adapter_name, metadata=metadata)

    def save_lora_weights(  # type: ignore[override]  # a class method there, without the pipeline's networks
        self, folder: str | Path, adapter_name: str = "default"
    ) -> None:
        """Write an adapter's weights and configuration to `folder`. Raises ValueError when there is none of that name."""
        found = ((name, getattr(self, name, None)) for name in self._lora_loadable_modules)
        save_adapter(folder, {name: network for name, network in found if network is not None}, adapter_name)


def save_adapter(folder: str | Path, networks: Mapping[str, nn.Module], adapter_name: str = "default") -> None:
    """Write the adapter of that name of "prior" and "decoder" to `folder`, in the format of `load_lora_weights` and diffusers.

    Equal adapters are equal files: safetensors writes entries of metadata in any order, so there is only one.
    """
    from peft import get_peft_model_state_dict

    layers: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, network in networks.items():
        config = getattr(network, "peft_config", {}).get(adapter_name)
        if config is not None:
            found = get_peft_model_state_dict(network, adapter_name=adapter_name)
            layers |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in found.items()}
            settings |= {f"{name}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    if not layers:
        raise ValueError(f"there is no adapter named {adapter_name!r}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_tensors(layers, Path(folder) / WEIGHTS, {METADATA: json.dumps(settings, indent=2, sort_keys=True)})


def _read(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and configuration of an adapter's file."""
    path = Path(source).expanduser()
    if path.suffix in (".bin", ".pt", ".ckpt", ".pth"):
        raise ValueError(f"{path} is a pickle and is refused; convert it to safetensors")
    if path.suffix != ".safetensors":
        folder = resolve(source)
        found = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{folder} must hold {WEIGHTS} or one other .safetensors, it holds {len(found)}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    check_safetensors(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get(METADATA, "null"))
        return {k: file.get_tensor(k) for k in file.keys()}, metadata  # noqa: SIM118
