"""The weights that a run starts or resumes with."""

import json
import re
import sys
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from prior.storage import read_weights

from ..io.checkpoints import check_safetensors, components_folder, resolve
from ..runtime.config import ConfigError, maker
from .checkpointer import Checkpoint
from .config import TrainConfig
from .distributed import Distributed
from .objectives import Objective


def load_starting_weights(
    objective: Objective, config: TrainConfig, checkpoint: Checkpoint | None, distributed: Distributed
) -> None:
    """Give the networks the weights of the checkpoint, of `init_from`, or new ones, and put on the adapter if there is one.

    An adapter's checkpoint holds the adapter alone: the networks' other weights are `init_from`'s then too. Raises
    ConfigError for weights of other networks.
    """
    if config.init_from and (checkpoint is None or objective.lora or objective.held_to_start):
        _load_init_from(objective, config.init_from, distributed)
    elif checkpoint is None:
        bar = partial(tqdm, desc="the first examples", disable=not distributed.is_main, file=sys.stderr, leave=False)
        objective.prepare(distributed.device, bar)
    objective.adapt()
    if checkpoint is not None:
        _load_checkpoint(objective, config, checkpoint)


def _load_init_from(objective: Objective, source: str, distributed: Distributed) -> None:
    """Start from a training run's averaged weights, or from a model: a shipped one's name, a folder, a Hub id."""
    if made_by := maker(source):
        raise ConfigError(f"init_from: {source} is not there yet: unclip train {made_by}, or init_from=null to start anew")
    folder, new = resolve(components_folder(source)), []
    for name, network in objective.trained.named_children():
        files = sorted((folder / name).glob("*.safetensors"))
        if not files:
            if name in objective.optional_init and not objective.lora:
                new.append(name)
                continue
            raise ConfigError(f"init_from: {folder / name} holds no .safetensors")
        for file in files:
            check_safetensors(file)
        _compare_clips(network, folder / name, distributed)
        state = {k: v.float() for f in files for k, v in read_weights(f).items()}
        _fill(network, objective.starting_weights(name, state), f"init_from: {folder / name}")
    distributed.report(f"initialised from {folder}" + (f"; it holds no {' or '.join(new)}, which starts anew" if new else ""))


def _compare_clips(network: nn.Module, folder: Path, distributed: Distributed) -> None:
    """Warn where weights to start from were trained against another CLIP than this run's."""
    own = getattr(network, "config", {}).get("clip_fingerprint")
    other = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("clip_fingerprint")
    if own and other and own != other:
        distributed.report(f"warning: {folder} was made for the CLIP {other}, and objective.clip is {own}")


def _load_checkpoint(objective: Objective, config: TrainConfig, checkpoint: Checkpoint) -> None:
    weights, saved_from = checkpoint.tensors["weights"], checkpoint.state["init_from"]
    if objective.lora:
        if saved_from != config.init_from:
            raise ConfigError(f"{checkpoint.origin} adapts {saved_from!r}, not init_from={config.init_from}")
        adapter = objective.trained_parameters()
        weights = {k: v for k, v in objective.trained.state_dict().items() if k not in adapter} | weights
    _fill(objective.trained, weights, checkpoint.origin)


def _fill(network: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load weights. Raises ConfigError, in one line, when they are of another network."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = re.sub(r"\s+", " ", str(error).split("\n")[1]).strip()
        raise ConfigError(f"{origin} does not fit this configuration: {first[:200]}") from None
