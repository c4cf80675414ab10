"""Weights, gradients, averages and moments in parts, one a process (ZeRO, arXiv 1910.02054; here by PyTorch's FSDP2)."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..runtime.config import ConfigError
from .objectives import Objective


def launched() -> str:
    """Reads the ZeRO stage from the FSDP settings of `accelerate launch`, and removes them from the environment.

    The trainer shards by itself, with the same code on CPUs and GPUs, so Accelerate must not do it a second time.

    Raises:
        ConfigError: for DeepSpeed, and for FSDP settings that the trainer does not support.
    """

    def asked(name: str) -> str:
        return os.environ.get(name, "").lower()

    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # would silently take the place of the configuration's
    if asked("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError("DeepSpeed is not supported: use sharding=zero2 or sharding=zero3 (PyTorch's FSDP2)")
    if asked("ACCELERATE_USE_FSDP") == "true":
        if asked("FSDP_VERSION") != "2":
            raise ConfigError("fsdp_config.fsdp_version must be 2")
        if asked("FSDP_OFFLOAD_PARAMS") == "true":
            raise ConfigError("fsdp_config.fsdp_offload_params is not supported: set it to false")
        if asked("FSDP_ACTIVATION_CHECKPOINTING") == "true":
            raise ConfigError("fsdp_config.fsdp_activation_checkpointing: use gradient_checkpointing=true instead")
        del os.environ["ACCELERATE_USE_FSDP"]
        return "zero3" if asked("FSDP_RESHARD_AFTER_FORWARD") == "true" else "zero2"
    return "none"


class Shards:
    """An objective's networks in shards, and on the main process a full copy, which validates, samples and is written.

    Blocks are gathered one at a time as they run ("zero3" frees each after its forward pass, "zero2" after its backward
    pass); what is outside of them stays gathered for the length of a step. The frozen networks are not sharded. Every
    method is for all processes to call together.
    """

    def __init__(self, objective: Objective, device: torch.device, stage: str, main: bool):
        self.objective, self.device = objective, device
        self.copy = copy.deepcopy(objective.trained).cpu() if main else None
        for parameter in objective.trained.parameters():
            parameter.data = parameter.data.contiguous()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": stage == "zero3"}
        for block in blocks(objective.trained) if objective.shards_blocks else ():
            fully_shard(block, **options)
        learned = {id(p) for p in objective.trained.parameters()}
        frozen = {p for p in objective.parameters() if id(p) not in learned}
        self.root = fully_shard(objective, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)

    def set_gradient_sync(self, sync: bool) -> None:
        """Whether the next backward pass reduces gradients over the processes: in the last one of a step."""
        self.root.set_requires_gradient_sync(sync)

    @contextmanager
    def gathered(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """`weights`, by their names in `trained`, gathered into the copy, which takes `trained`'s place on the main process."""
        gathered = {name: gather_full(weight, self.copy is not None) for name, weight in weights.items()}
        if self.copy is None:
            yield
            return
        self.copy.load_state_dict(gathered, strict=False)
        trained, self.objective.trained = self.objective.trained, self.copy.to(self.device)
        self.copy.train(trained.training)
        try:
            yield
        finally:
            self.objective.trained = trained
            self.copy.cpu()


def blocks(trained: nn.Module) -> Iterator[nn.Module]:
    """The modules that networks keep lists of, and run by calling them: what is gathered and let go of in one piece."""
    containers = (nn.ModuleList, nn.ModuleDict)
    for module in trained.children():
        if isinstance(module, nn.ModuleList):
            yield from (m for m in _leaves(module, containers))
        else:
            yield from blocks(module)


def _leaves(module: nn.Module, containers: tuple[type, ...]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, containers):
            yield from _leaves(child, containers)
        else:
            yield child


def gather_full(tensor: Tensor, keep: bool = True) -> Tensor:
    """A tensor gathered from all processes, on the CPU if it was sharded; an empty one where it is not to be kept."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if keep else torch.empty(0)


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a full tensor, in the placement, device and memory layout of `like`."""
    if isinstance(like, DTensor):
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(full)
