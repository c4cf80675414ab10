"""The optimizer of a run, and its state in checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .muon import Muon, hidden_matrices
from .objectives.base import Objective
from .sharding import local_shard

STATE = ("step", "exp_avg", "exp_avg_sq", "momentum")  # what AdamW and Muon keep of a parameter


def build_optimizer(config: TrainConfig, objective: Objective, precision: str) -> torch.optim.AdamW:
    """AdamW or Muon over an objective's parameter groups; Muon's matrices are orthogonalised in bf16 where `precision` is.

    Each group has `factor`, which multiplies the learning rate.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    settings["fused"] = config.fused
    hidden = set(hidden_matrices(objective.trained)) if config.optimizer == "muon" else set()
    groups = []
    for named, factor in objective.parameter_groups():
        for muon in (False, True):
            chosen = [p for n, p in named.items() if (n in hidden) == muon]
            groups += [{"params": chosen, "factor": factor, "muon": muon}] if chosen else []
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    return Muon(groups, torch.bfloat16 if precision == "bf16" else torch.float32, **settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of an optimizer by "PARAMETER.PART", PART one of `STATE`."""
    return {
        f"{name}.{part}": value
        for name, parameter in parameters.items()
        for part, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Continue from a saved `optimizer_state`, of which each process keeps its shard.

    Raises ValueError for the state of another optimizer.
    """
    hidden = {p for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    for name, parameter in parameters.items():
        state = {part: saved[f"{name}.{part}"] for part in STATE if f"{name}.{part}" in saved}
        if state and ("momentum" in state) != (parameter in hidden):
            raise ValueError(f"was trained by another optimizer than {'muon' if isinstance(optimizer, Muon) else 'adamw'}")
        # in the parameter's own memory layout: the fused optimizer reads both side by side
        for part, value in state.items():
            optimizer.state[parameter][part] = value.to(parameter.device) if part == "step" else local_shard(value, parameter)
