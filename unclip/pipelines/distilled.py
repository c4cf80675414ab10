"""The distilled decoder: low-rank changes of the full one's weights, for few steps without guidance."""

# B batch, r rank

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn

from ..io.checkpoints import check_safetensors, save_tensors

_FACTORS = ("lora_A", "lora_B")


@dataclass
class Distilled:
    """The result of the stage `decoder_distill`: the adapter, and the settings that the decoder is sampled with.

    `factors` names layers of the decoder, each with A [r, in, ...] and B [out, r, ...] of W + `scale` B A (arXiv
    2106.09685, section 4.1). It is sampled in `evaluations` steps of DDIM without guidance, because it was
    distilled with the scale `guidance`. `shift` sets its timesteps (`shift_timesteps`).
    `decoder` is the fingerprint of the full decoder's weights.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    evaluations: int
    guidance: float
    decoder: str
    shift: float = 1.0
    _cached: tuple[tuple[Any, ...], ModelMixin] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of_adapter(cls, state: Mapping[str, Tensor], **facts: Any) -> "Distilled":
        """From PEFT's names: `LAYER.lora_A.weight` and `LAYER.lora_B.weight`."""
        layers = sorted({name.rsplit(".", 2)[0] for name in state})
        factors = {}
        for layer in layers:
            down, up = (state[f"{layer}.{factor}.weight"].detach() for factor in _FACTORS)
            factors[layer] = (down, up)
        return cls(factors, **facts)

    @classmethod
    def load(cls, path: Path) -> "Distilled":
        """Raises ValueError, naming the file, for one that is truncated or holds something else."""
        names = check_safetensors(path)
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            lacking = [k for k in ("scale", "evaluations", "guidance", "decoder") if k not in facts]
            if lacking or not all(n.endswith(tuple(f".{f}.weight" for f in _FACTORS)) for n in names):
                raise ValueError(f"{path} is not a distilled decoder: it states no {(lacking or ['factors'])[0]}")
            state = {name: file.get_tensor(name) for name in names}
        numbers: dict[str, Any] = {k: float(facts[k]) for k in ("scale", "guidance", "shift") if k in facts}
        return cls.of_adapter(state, **numbers, evaluations=int(facts["evaluations"]), decoder=facts["decoder"])

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        state = {}
        for layer, factors in self.factors.items():
            for name, factor in zip(_FACTORS, factors, strict=True):
                state[f"{layer}.{name}.weight"] = factor.cpu().to(dtype).contiguous()
        facts = {k: str(getattr(self, k)) for k in ("scale", "evaluations", "guidance", "shift", "decoder")}
        save_tensors(state, path, facts)

    def network(self, decoder: ModelMixin) -> ModelMixin:
        """A copy of `decoder` with the adapter merged, which shares with it all that the adapter does not change.

        Cached for the weights, dtype, layout, adapters and attention that `decoder` has now. Raises ValueError for a
        decoder of other shapes.
        """
        weights = {name: _weight(_layer(decoder, name)) for name in self.factors}
        key = _state(decoder)
        if self._cached is None or self._cached[0] != key:
            shared = {id(t): t for t in (*decoder.parameters(), *decoder.buffers())}
            network = copy.deepcopy(decoder, shared)
            for name, (down, up) in self.factors.items():
                weight = weights[name]
                change = self.scale * up.to(weight.device).float().flatten(1) @ down.to(weight.device).float().flatten(1)
                if change.numel() != weight.numel():
                    raise ValueError(f"the distilled decoder does not fit: {name} is {list(weight.shape)} in the full one")
                changed = torch.empty_like(weight).copy_(weight.float() + change.view(weight.shape))
                _layer(network, name).register_parameter("weight", nn.Parameter(changed, requires_grad=False))
            self._cached = (key, network)
        return self._cached[1]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The sampling settings of this decoder for a call's arguments.

        Raises ValueError for a setting that it was distilled with and cannot be chosen, and for more steps than it was
        distilled for.
        """
        built_in = f"guidance of its own of scale {self.guidance:g} at timesteps of its own"
        for name in ("decoder_guidance_scale", "decoder_guidance_interval", "decoder_timestep_shift"):
            if given.get(name) is not None:
                raise ValueError(f"the distilled decoder has {built_in}: {name} cannot be chosen, got {given[name]!r}")
        steps = given.get("decoder_num_inference_steps")
        steps = self.evaluations if steps is None else steps
        if isinstance(steps, int) and steps > self.evaluations:
            most = f"the distilled decoder was made for {self.evaluations} steps"
            raise ValueError(f"{most}: decoder_num_inference_steps is {steps}")
        return {
            "decoder_num_inference_steps": steps,
            "decoder_guidance_scale": 1.0,
            "decoder_timestep_shift": self.shift,
        }

    def forget(self) -> None:
        """Free the weights that `network` made."""
        self._cached = None


def fingerprint(decoder: nn.Module) -> str:
    """Identifies a decoder's weights, in float16: the same before and after an export."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(torch.float16).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _state(network: nn.Module) -> tuple[Any, ...]:
    """Equal as long as nothing changed in a network that a merged copy depends on."""
    weights = ((w.data_ptr(), w._version, w.dtype) for w in network.parameters())
    others: list[object] = []
    for module in network.modules():
        if hasattr(module, "merged_adapters"):  # PEFT's, which changes a weight without a new version
            facts = (module.disable_adapters, module.active_adapters, module.scaling, module.merged_adapters)
            others.append(repr((*facts, id(module.base_layer))))
        others += [id(getattr(module, name)) for name in ("function", "processor") if hasattr(module, name)]  # of attention
    return *weights, *others


def _layer(network: nn.Module, name: str) -> nn.Module:
    """The layer of that name, without PEFT's wrapper."""
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the distilled decoder does not fit: the full one has no {name}") from None
    return getattr(layer, "base_layer", layer)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"a {type(layer).__name__} has no weight")
    return weight
