"""THE training loop: every stage runs through it, on one process or many, and ends as if it had never been stopped."""

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from tqdm import tqdm

from prior.storage import read_weights

from ..io.checkpoints import (
    DiskFull,
    check_safetensors,
    checkpoints,
    components_folder,
    load_checkpoint,
    no_space,
    remove_checkpoint,
    resolve,
    save_checkpoint,
    set_aside,
    write_beside,
)
from ..runtime.compiling import why_not
from ..runtime.config import ConfigError, construct, load_config, maker, nearest
from ..runtime.precision import best_device, fast_dtype
from ..runtime.processes import PATIENCE, settle
from .muon import Muon, hidden_matrices
from .objectives import Objective, create
from .objectives.base import to_device
from .sharding import STAGES as SHARDINGS
from .sharding import Shards, launched, own_part, whole

logger = logging.getLogger("unclip.training")

OPTIMIZERS = ("adamw", "muon")
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum")  # what they keep of a parameter


@dataclass
class Run:
    """How a stage is trained. `batch_size` is a process's share of one backward pass."""

    stage: str
    output_dir: str
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 500
    cooldown: float = 0.2  # the last share of the steps, over which the rate falls to zero
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    optimizer: str = "adamw"  # or "muon": hidden layers by orthogonalised momentum (arXiv 2502.16982), the rest by AdamW
    clip_norm: float = 1.0  # 0 never clips
    gradient_accumulation: int = 1
    ema: float = 0.1  # width of the average relative to the training so far (EDM2, arXiv 2312.02696, section 3.1)
    ema_decay: float = 0.0  # above 0: a constant decay in place of that width (the paper's Table 3)
    precision: str = "auto"  # "auto", "no", "bf16" or "fp16"
    compile: bool = False
    fused: bool = True  # AdamW in one kernel for all parameters
    sharding: str = "none"  # or ZeRO's stage 2 or 3 (arXiv 1910.02054): what the processes hold in parts
    seed: int = 0
    workers: int = 1
    log_every: int = 50
    save_every: int = 0  # steps; 0 leaves it to save_minutes
    save_minutes: float = 10.0
    keep: int = 2
    validate_every: int = 1000  # steps, and after the last one; 0 is never
    sample_every: int = 1000  # the same for pictures
    init_from: str | None = None
    gradient_checkpointing: bool = False  # activations are computed again on the way back (arXiv 1604.06174)
    explosion: float = 100.0  # a loss this many times the median of the steps before it stops the run; 0 never does
    report_to: list[str] | str | None = None  # trackers beside log.jsonl, by Accelerate's names: tensorboard, wandb, ...

    def __post_init__(self):
        self.betas = tuple(self.betas)
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        known, installed = list(LOGGER_TYPE_TO_CLASS), [str(t) for t in get_available_trackers()]
        for tracker in self.report_to:
            if tracker not in known:
                raise ValueError(f"report_to: unknown tracker {tracker!r}{nearest(tracker, known)}; known: {', '.join(known)}")
            if tracker not in installed:
                raise ValueError(f"report_to: {tracker} is not installed: pip install {tracker}")
        for name in ("max_steps", "batch_size", "gradient_accumulation", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("auto", "no", "bf16", "fp16"):
            raise ValueError(f"precision must be auto, no, bf16 or fp16, got {self.precision!r}")
        if self.optimizer not in OPTIMIZERS:
            known = " or ".join(OPTIMIZERS)
            raise ValueError(f"optimizer must be {known}, got {self.optimizer!r}{nearest(str(self.optimizer), OPTIMIZERS)}")
        if self.optimizer == "muon" and self.precision == "fp16":
            raise ValueError("optimizer muon does not go with precision fp16: choose bf16 or no")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding must be {', '.join(SHARDINGS[:-1])} or {SHARDINGS[-1]}, got {self.sharding!r}")
        rates = ("learning_rate", "weight_decay", "eps", "clip_norm", "explosion", "save_minutes")
        for name in (*rates, "warmup_steps", "seed", "workers", "save_every", "validate_every", "sample_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown must be in [0, 1], got {self.cooldown}")
        if not 0 <= self.ema < 0.289:  # a flat profile's standard deviation is 12^-1/2
            raise ValueError(f"ema must be from 0 to less than 0.289, got {self.ema}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to less than 1, got {self.ema_decay}")

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, constant, linear cool-down to zero."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        tail = self.cooldown * self.max_steps
        cool = min(1.0, (self.max_steps - step) / tail) if tail else 1.0
        return self.learning_rate * min(warm, cool)


class PowerEMA:
    """Average of the weights with a power-function profile (EDM2, arXiv 2312.02696, equations 1-4).

    beta_t = (1 - 1/t)^(gamma + 1), with gamma such that the profile's standard deviation is `width` of the training; a
    `decay` above 0 bounds beta_t, which past the first steps makes an exponential average of it.
    """

    def __init__(self, parameters: dict[str, Tensor], width: float, decay: float = 0.0):
        self.shadow = {n: p.detach().clone().float() for n, p in parameters.items()}
        self.decay = decay
        width = width or 0.1
        roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
        self.gamma = float(roots.real.max())

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor], step: int) -> None:
        """Take in the weights after step `step` (from 1)."""
        beta = min((1 - 1 / step) ** (self.gamma + 1), self.decay or 1.0)
        weights = [p if p.dtype == torch.float32 else p.float() for p in parameters.values()]
        torch._foreach_lerp_([self.shadow[n] for n in parameters], weights, 1 - beta)

    @contextmanager
    def applied(self, parameters: dict[str, Tensor]) -> Iterator[None]:
        """The averaged weights in place of the trained ones, for the length of a `with`."""
        weights = [p.detach() for p in parameters.values()]
        kept = [torch.empty_like(w) for w in weights]
        torch._foreach_copy_(kept, weights)
        try:
            torch._foreach_copy_(weights, [self.shadow[n] for n in parameters])
            yield
        finally:
            torch._foreach_copy_(weights, kept)


class GlobalBatches(Sampler):
    """Indices of a process's share: step `s` of any number of processes sees the same examples, in whatever split."""

    def __init__(self, run: Run, first_step: int, rank: int, processes: int):
        self.run, self.first_step, self.rank, self.processes = run, first_step, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        size = self.run.batch_size
        parts = self.run.gradient_accumulation * self.processes
        for step in range(self.first_step, self.run.max_steps):
            for part in range(self.run.gradient_accumulation):
                start = (step * parts + part * self.processes + self.rank) * size
                yield list(range(start, start + size))

    def __len__(self) -> int:
        return (self.run.max_steps - self.first_step) * self.run.gradient_accumulation


def train(config_path: str | Path, overrides: list[str]) -> None:
    """Train the stage that a configuration names, or go on with it where its output folder left off."""
    config = load_config(config_path, overrides)
    sections = {k: config.pop(k) or {} for k in ("model", "data", "objective") if k in config}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{name} must be a section of keys, got {section!r}")
    run = construct(Run, config, "config")
    Loop(run, sections).fit()


class Loop:
    """One run: its networks, optimiser, average and log, at some step."""

    def __init__(self, run: Run, sections: dict[str, Any]):
        self.run, self.sections, self.folder = run, sections, Path(run.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"output_dir {self.folder} is a file")
        precision = run.precision
        if precision == "auto":
            precision = "bf16" if fast_dtype() == torch.bfloat16 else "no"
        asked = launched()
        self.accelerator = Accelerator(
            cpu=best_device().type == "cpu",  # it would not look for other processes on a CPU by itself
            mixed_precision=precision,
            gradient_accumulation_steps=run.gradient_accumulation,
            log_with=run.report_to or None,
            project_config=ProjectConfiguration(str(self.folder), logging_dir=str(self.folder / "trackers")),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.main = self.accelerator.is_main_process
        if precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ConfigError("precision fp16 needs a GPU: choose bf16 or no")
        self._say(f"processes: {self.accelerator.num_processes}, device: {self.accelerator.device.type}, dtype: {precision}")
        self.sharding = self._shardable(asked if run.sharding == "none" else run.sharding, precision)
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None  # the step of the newest checkpoint
        self.recent: deque[float] = deque(maxlen=100)  # losses of the steps before this one
        # a step's number, the losses of its backward passes and its gradient's norm: of the steps that are not checked yet
        self.unchecked: list[tuple[int, Tensor, Tensor]] = []
        self.checks_every_step = self.accelerator.device.type == "cpu"  # another device would be waited for
        self.stopping = False

    # -- state

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.objective.trained.named_parameters() if p.requires_grad}

    def _weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the networks: all of them, or the adapter alone where `init_from` holds the rest."""
        return dict(self._parameters()) if self.objective.lora else self.objective.trained.state_dict()

    def _create(self) -> None:
        """The networks and examples, and the folder of the run once its configuration has turned out to be one."""
        run = self.run
        set_seed(run.seed)
        self.objective: Objective = create(run.stage, self.sections, run.seed)
        if self.sharding and not self.objective.shardable:
            raise ConfigError(f"the stage {run.stage} cannot be trained in parts: leave sharding {self.sharding} out")
        if self.objective.lora and not run.init_from:
            raise ConfigError("objective.lora adapts trained weights: name them by init_from=")
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The run's folder for this run alone: two that write into one would each prune and overwrite the other's.

        The claim is the main process's own and goes with it, however it ends; its data workers don't inherit it. A file
        system without locks gives none. Raises ConfigError, saying who has the folder.
        """
        with open(self.folder / ".lock", "a+") as file:
            owner = None
            if self.main:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                except OSError as error:
                    if error.errno in (errno.EACCES, errno.EAGAIN):
                        file.seek(0)
                        owner = file.read() or "another process"
            if any(self._agree(owner is not None)):
                if not self.main:
                    raise SystemExit(1)
                raise ConfigError(f"{self.folder} is being trained in by {owner}: stop that run, or choose another output_dir")
            yield

    def _setup(self) -> None:
        run, objective = self.run, self.objective
        found = self._newest()
        if run.init_from and (found is None or objective.lora or objective.held_to_start):
            self._initialise(run.init_from)
        elif found is None:
            bar = partial(tqdm, desc="the first examples", disable=not self.main, file=sys.stderr, leave=False)
            objective.prepare(self.accelerator.device, bar)
        objective.adapt()
        if found is not None:
            self._restore_weights(*found)
        if run.gradient_checkpointing:
            objective.checkpoint_activations()
        self.shards = Shards(objective, self.accelerator.device, self.sharding, self.main) if self.sharding else None
        objective.to(self.accelerator.device)
        for network in objective.trained.children() if not self.shards else ():  # FSDP2 takes no other layout than contiguous
            network.to(memory_format=torch.channels_last)
        self.optimizer = self._optimizer()
        self.ema = PowerEMA(self._parameters(), run.ema, run.ema_decay) if run.ema or run.ema_decay else None
        if found is not None:
            self._restore(*found)
        if run.compile:
            reason = why_not(self.accelerator.device)
            if reason:
                raise ConfigError(f"compile=true: {reason}")
            objective.compile_networks()
        if self.shards:
            self.wrapped = self.accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)  # no DDP
            self.prepared = self.accelerator.prepare(self.optimizer)
        else:
            self.wrapped, self.prepared = self.accelerator.prepare(objective, self.optimizer)

    def _optimizer(self) -> torch.optim.AdamW:
        run, objective = self.run, self.objective
        settings = {"lr": run.learning_rate, "betas": run.betas, "eps": run.eps, "weight_decay": run.weight_decay}
        settings["fused"] = run.fused
        hidden = set(hidden_matrices(objective.trained)) if run.optimizer == "muon" else set()
        groups = []
        for named, factor in objective.parameter_groups():
            for muon in (False, True):
                chosen = [p for n, p in named.items() if (n in hidden) == muon]
                groups += [{"params": chosen, "factor": factor, "muon": muon}] if chosen else []
        if run.optimizer == "adamw":
            return torch.optim.AdamW(groups, **settings)
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        return Muon(groups, dtype, **settings)

    def _shardable(self, sharding: str, precision: str) -> str | None:
        """What is shared out, or None. Raises ConfigError for what has not been made to work in parts."""
        if sharding == "none":
            return None
        if self.accelerator.num_processes == 1:
            raise ConfigError(f"sharding {sharding} needs several processes: start with torchrun or accelerate launch")
        if precision == "fp16":
            raise ConfigError(f"sharding {sharding} does not go with precision fp16: choose bf16 or no")
        if self.run.compile:
            raise ConfigError(f"sharding {sharding} does not go with compile=true")
        if self.run.optimizer == "muon":
            raise ConfigError(f"sharding {sharding} does not go with optimizer muon, which needs whole matrices: choose adamw")
        return sharding

    def _newest(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest checkpoint that is whole: the main process looks for it, and all of them read it."""
        found, chosen = None, None
        for folder in checkpoints(self.folder) if self.main else []:
            try:
                found, chosen = load_checkpoint(folder), folder
                break
            except (ValueError, KeyError) as error:
                self._say(f"skipping a damaged checkpoint, now {set_aside(folder, 'damaged').name}: {error}")
        chosen = broadcast_object_list([chosen])[0]
        return found if self.main or chosen is None else load_checkpoint(chosen)

    def _initialise(self, source: str) -> None:
        """Start from a training run's averaged weights, or from a model: a shipped one's name, a folder, a Hub id."""
        if made_by := maker(source):
            raise ConfigError(f"init_from: {source} is not there yet: unclip train {made_by}, or init_from=null to start anew")
        folder, fresh = resolve(components_folder(source)), []
        for name, network in self.objective.trained.named_children():
            files = sorted((folder / name).glob("*.safetensors"))
            if not files:
                if name in self.objective.anew and not self.objective.lora:
                    fresh.append(name)
                    continue
                raise ConfigError(f"init_from: {folder / name} holds no .safetensors")
            for file in files:
                check_safetensors(file)
            self._compare_clips(network, folder / name)
            state = {k: v.float() for f in files for k, v in read_weights(f).items()}
            _fill(network, self.objective.starting(name, state), f"init_from: {folder / name}")
        self._say(f"initialised from {folder}" + (f"; it holds no {' or '.join(fresh)}, which starts anew" if fresh else ""))

    def _compare_clips(self, network: nn.Module, folder: Path) -> None:
        """Tell where weights to start from were made for another CLIP than this run's."""
        own = getattr(network, "config", {}).get("clip_fingerprint")
        other = json.loads((folder / "config.json").read_text()).get("clip_fingerprint")
        if own and other and own != other:
            self._say(f"warning: {folder} was made for the CLIP {other}, and objective.clip is {own}")

    def _restore_weights(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        where, trained = self._origin(state), self.objective.trained
        weights = tensors["weights"]
        if self.objective.lora:
            if state["init_from"] != self.run.init_from:
                raise ConfigError(f"{where} adapts {state['init_from']!r}, not init_from={self.run.init_from}")
            adapter = self._parameters()
            weights = {k: v for k, v in trained.state_dict().items() if k not in adapter} | weights
        _fill(trained, weights, where)

    def _origin(self, state: dict[str, Any]) -> str:
        return f"the checkpoint of step {state['step']} in {self.folder}"

    @torch.no_grad()
    def _restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """The average, the moments and the step; the weights are there already."""
        parameters, where = self._parameters(), self._origin(state)
        if self.ema:
            if tensors.get("ema", {}).keys() != self.ema.shadow.keys():
                raise ConfigError(f"{where} has no average of these weights: ema or what is trained was set otherwise then")
            self.ema.shadow = {name: own_part(tensors["ema"][name], shadow) for name, shadow in self.ema.shadow.items()}
        moments = tensors["optimizer"]
        hidden = {p for group in self.optimizer.param_groups if group["muon"] for p in group["params"]}
        for name, parameter in parameters.items():
            kept = {part: moments[f"{name}.{part}"] for part in MOMENTS if f"{name}.{part}" in moments}
            if kept and ("momentum" in kept) != (parameter in hidden):
                raise ConfigError(f"{where} was trained by another optimizer than {self.run.optimizer}")
            # in the parameter's own memory layout: the fused optimiser walks through both side by side
            for part, value in kept.items():
                restored = value.to(parameter.device) if part == "step" else own_part(value, parameter)
                self.optimizer.state[parameter][part] = restored
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.saved = state["step"], state["seconds"], state["step"]
        self.recent.extend(state.get("recent", []))  # what a loss that explodes is told by
        self._say(f"resuming at step {self.step}")
        if state["samples"] != self.step * self._samples_per_step():
            before = state["samples"] // max(self.step, 1)
            self._say(f"a step had {before} examples and has {self._samples_per_step()} now: this is not the run it was")

    def _save(self) -> None:
        """Write a checkpoint, unless this step's is there; prune; write `latest/`. DiskFull ends every process."""
        self._check()
        if self.saved == self.step:
            return
        tensors = self._state() if self.main or self.shards else {}
        state = {"step": self.step, "seconds": self.seconds, "samples": self.step * self._samples_per_step()}
        state |= {"init_from": self.run.init_from, "recent": list(self.recent)}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()

        def save() -> None:
            save_checkpoint(self._checkpoint(self.step), tensors, state)
            for old in checkpoints(self.folder)[self.run.keep :]:
                remove_checkpoint(old)

        self._on_main(save)
        self._write("latest")
        self.saved = self.step

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds. Where the networks are in parts, all processes gather it and the main one has it."""
        optimizer = {
            f"{name}.{part}": value
            for name, parameter in self._parameters().items()
            for part, value in self.optimizer.state.get(parameter, {}).items()
        }
        tensors = {"weights": self._weights(), "optimizer": optimizer} | ({"ema": self.ema.shadow} if self.ema else {})
        return {kind: {name: whole(v, self.main) for name, v in content.items()} for kind, content in tensors.items()}

    def _on_main(self, action: Callable[[], None]) -> None:
        """Have the main process do something with files. What it could not write ends every process."""
        failure = None
        if self.main:
            try:
                action()
            except (OSError, SafetensorError) as error:
                failure = error
        if any(self._agree(failure is not None)):
            raise failure or SystemExit(1)

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:08d}"

    def _samples_per_step(self) -> int:
        return self.run.batch_size * self.run.gradient_accumulation * self.accelerator.num_processes

    # -- the loop

    def fit(self) -> None:
        """Train to `max_steps`, or until a signal says to stop.

        Raises FloatingPointError for a loss or gradient that is not finite or a loss that explodes, and DiskFull, each in
        one line that names the last good checkpoint.
        """
        if (self.folder / "final").is_dir():
            self._say(f"{self.folder / 'final'} is there already: this run is finished")
            return
        try:
            self._create()
            with self._claimed():
                self._setup()
                self._resume_log()
                self._start_trackers()
                with self._signals():
                    self._train()
        except (OSError, SafetensorError) as error:
            reason = str(error) if isinstance(error, DiskFull) else no_space(error)
            if reason is None:
                raise
            raise DiskFull(f"step {self.step}: {reason}; last checkpoint: {self._last()}") from None
        settle(self.accelerator.state)
        self.accelerator.end_training()

    def _train(self) -> None:
        run = self.run
        batches = iter(self._loader())
        seen: dict[str, list[Tensor]] = {}
        logged, saved_at = self.step, time.monotonic()
        logged_at = saved_at
        self.objective.train()
        stopping = False
        bar = tqdm(
            total=run.max_steps, initial=self.step, desc=run.stage, disable=not self.main, mininterval=5, file=sys.stderr
        )
        with bar, _ended(batches):  # the bar is closed before an error is told
            while self.step < run.max_steps and not stopping:
                for scalars in self._step(batches):
                    for key, value in scalars.items():
                        seen.setdefault(key, []).append(value)
                bar.update()
                if self.step % run.log_every == 0 or self.step == 1:
                    self._check()
                    now = time.monotonic()
                    means = _means(seen)
                    self.seconds += now - logged_at
                    speed = (self.step - logged) * self._samples_per_step() / (now - logged_at)
                    bar.set_postfix(loss=f"{means['loss']:.4f}", images_per_s=f"{speed:.1f}", refresh=False)
                    self._log("train", means | {"rate": run.rate(self.step - 1), "images_per_s": speed})
                    seen, logged, logged_at = {}, self.step, now
                last, paused = self.step == run.max_steps, time.monotonic()
                if run.validate_every and (last or self.step % run.validate_every == 0):
                    self._evaluate(validate=True)
                if run.sample_every and (last or self.step % run.sample_every == 0):
                    self._evaluate(validate=False)
                by_time = run.save_minutes and time.monotonic() - saved_at > 60 * run.save_minutes and not run.save_every
                stopping, by_time = self._agree(self.stopping, by_time)
                if by_time or (run.save_every and self.step % run.save_every == 0):
                    self._save()
                    saved_at = time.monotonic()
                logged_at += time.monotonic() - paused  # what is not training counts for no speed
        self._save()
        if self.step < run.max_steps:
            self._say(f"stopped at step {self.step}; the same command goes on from here")
        else:
            self._finish()

    def _step(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """One step of the optimiser and of the average; -> what to log of each backward pass.

        On a CPU raises FloatingPointError before the weights change. Nothing is read from another device.
        """
        run, accelerator = self.run, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = run.rate(self.step) * group["factor"]
        passes: list[dict[str, Tensor]] = []
        for part in range(run.gradient_accumulation):
            # dropout's own numbers for every pass: they are the same after a resume
            number = (self.step * run.gradient_accumulation + part) * accelerator.num_processes + accelerator.process_index
            torch.manual_seed((run.seed * 1_000_003 + number) % 2**63)
            if self.shards:
                self.objective.set_requires_gradient_sync(part == run.gradient_accumulation - 1)
            with accelerator.accumulate(self.wrapped):
                loss, metrics = self.wrapped(to_device(self._next(batches), accelerator.device))
                accelerator.backward(loss)
                passes.append({"loss": loss.detach()} | {k: v.detach() for k, v in metrics.items()})
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.objective.trained.parameters(), run.clip_norm or math.inf)
                    norm = whole(norm)
                    self.unchecked.append((self.step, torch.stack([p["loss"] for p in passes]), norm))
                    if self.checks_every_step:
                        self._check()
                self.prepared.step()
                self.prepared.zero_grad()
        self.step += 1
        if self.ema:
            self.ema.update(self._parameters(), self.step)
        passes[-1]["grad_norm"] = norm
        return passes

    @staticmethod
    def _next(batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch. What a data worker could not read is told in its own words, without the worker's traceback."""
        try:
            return next(batches)
        except ValueError as error:
            if not str(error).startswith("Caught "):
                raise
            said = re.split(rf"^[\w.]*{type(error).__name__}: ", str(error), flags=re.MULTILINE)[-1]
            raise type(error)(said.strip()) from None

    def _check(self) -> None:
        """Stop the run, on every process, when one's losses or the gradient's norm went wrong in a step not checked yet.

        What a step after that made of the weights is neither logged nor saved.
        """
        unchecked, self.unchecked = self.unchecked, []
        for step, losses, norm in unchecked:
            self._check_step(step, losses.tolist(), float(norm))

    def _check_step(self, step: int, losses: list[float], norm: float) -> None:
        loss = sum(losses) / len(losses)
        median = statistics.median(self.recent) if len(self.recent) >= 20 else math.inf
        exploded = self.run.explosion and median > 0 and loss > self.run.explosion * median
        lost = not math.isfinite(norm) and self.accelerator.scaler is None  # fp16's scaler leaves such a step out itself
        self.recent.append(loss)
        if not any(self._agree(not math.isfinite(loss) or lost or exploded)):
            return
        # one row a process: the losses of its backward passes
        every = self.accelerator.gather(torch.tensor([losses], device=self.accelerator.device)).tolist()
        if not self.main:
            raise SystemExit(1)
        whole = [value for row in every for value in row]
        if not all(map(math.isfinite, whole)):
            what, wrong = "is not finite", [not math.isfinite(v) for v in whole]
        elif not math.isfinite(norm):
            what, wrong = f"is {loss:.4g} and its gradient not finite", [True] * len(whole)
        else:
            what, wrong = f"is {loss:.4g}, {loss / median:.3g} times the median before it", [v == max(whole) for v in whole]
        size, parts = self.run.batch_size, self.run.gradient_accumulation
        places = [(part * len(every) + rank) * size for rank in range(len(every)) for part in range(parts)]
        first = step * self._samples_per_step()
        ranges = [f"{first + p}-{first + p + size - 1}" for p, bad in sorted(zip(places, wrong, strict=True)) if bad]
        aside = ""
        if self.saved == step and self._checkpoint(step).is_dir():  # nothing has been learned from these weights yet
            aside = f"; {set_aside(self._checkpoint(step), 'suspect').name} holds the weights that led here"
        where = f"the loss of step {step + 1} {what}, on samples {', '.join(ranges)}"
        raise FloatingPointError(f"{where}{aside}; last good checkpoint: {self._last()}")

    def _loader(self) -> DataLoader:
        sampler = GlobalBatches(self.run, self.step, self.accelerator.process_index, self.accelerator.num_processes)
        workers = self.run.workers
        return DataLoader(
            self.objective.examples,
            batch_sampler=sampler,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_leave_signals,
        )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the trained ones' place, on the main process."""
        self.objective.eval()
        if self.shards:
            with self.shards.whole(self.ema.shadow if self.ema else self._parameters()):
                yield
        elif self.ema and self.main:
            with self.ema.applied(self._parameters()):
                yield
        else:
            yield
        self.objective.train()

    def _evaluate(self, validate: bool) -> None:
        """Metrics or a picture of the averaged weights, on the main process."""
        self._check()
        with self._averaged(), self.accelerator.autocast():
            if self.main and validate:
                metrics = self.objective.validate()
                if metrics:
                    self._log("validation", metrics)
            elif self.main:
                picture = self.objective.sample()
                if picture is not None:
                    (self.folder / "samples").mkdir(exist_ok=True)
                    picture.save(self.folder / "samples" / f"{self.step:08d}.png")
        self.accelerator.wait_for_everyone()

    def _write(self, name: str) -> None:
        """The averaged weights for a pipeline, in `latest/` while the run goes on and `final/` at its end."""
        partial, target = self.folder / f"{name}.partial", self.folder / name

        def write() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            self.objective.write(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)

        with self._averaged():
            self._on_main(write)

    def _finish(self) -> None:
        self._write("final")
        if self.main:
            shutil.rmtree(self.folder / "latest", ignore_errors=True)
        self._say(f"finished: {self.folder / 'final'}")

    # -- telling and stopping

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step that is under way."""

        def stop(number: int, frame: Any) -> None:
            self.stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _agree(self, *flags: Any) -> list[bool]:
        """Each flag, true on every process when it is on any."""
        if self.accelerator.num_processes == 1:
            return [bool(f) for f in flags]
        raised = torch.tensor([float(bool(f)) for f in flags], device=self.accelerator.device)
        return (self.accelerator.reduce(raised, "sum") > 0).tolist()

    def _last(self) -> str:
        found = checkpoints(self.folder)
        return str(found[0]) if found else "none"

    def _say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def _log(self, kind: str, values: dict[str, float]) -> None:
        if self.main:
            row = {"kind": kind, "step": self.step, "samples": self.step * self._samples_per_step()}
            row |= {"seconds": round(self.seconds, 1)} | {k: round(float(v), 6) for k, v in values.items()}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self.accelerator.log({f"{kind}/{k}": float(v) for k, v in values.items()}, step=self.step)
            if kind == "validation":
                self._say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def _resume_log(self) -> None:
        """Forget the rows of steps that will be taken again, and a last one that a kill cut short."""
        path = self.folder / "log.jsonl"
        if not self.main or not path.is_file():
            return
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        kept = "".join(line for line in whole if json.loads(line)["step"] <= self.step)
        write_beside(path, lambda partial: partial.write_text(kept))

    def _start_trackers(self) -> None:
        if self.run.report_to:
            settings = {k: str(v) for k, v in {**vars(self.run), **self.sections}.items()}
            more = {"tensorboard": {"purge_step": self.step + 1}} if self.step else {}
            self.accelerator.init_trackers("unclip", settings, more)


def _means(seen: dict[str, list[Tensor]]) -> dict[str, float]:
    """The means of scalars over several backward passes, read from the device at once; NaN is a mean of nothing."""
    found = {name: [v for v in torch.stack(values).tolist() if not math.isnan(v)] for name, values in seen.items()}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _fill(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load weights. Raises ConfigError, in one line, when they are of another network."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = re.sub(r"\s+", " ", str(error).split("\n")[1]).strip()
        raise ConfigError(f"{where} does not fit this configuration: {first[:200]}") from None


@contextmanager
def _ended(batches: Iterator) -> Iterator[None]:
    """End the data workers with what is in here.

    torch does when nothing refers to them any more. An error's traceback does, and whoever leaves Python then waits for them
    for ever: they hear no signal.
    """
    try:
        yield
    finally:
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()


def _leave_signals(worker: int) -> None:
    """A signal to the whole process group is for the main process, which saves and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
