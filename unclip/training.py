"""THE training loop: every stage runs through it, on one process or many, and ends as if it had never been stopped."""

import json
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from .checkpoints import checkpoints, components_folder, load_checkpoint, resolve, save_checkpoint, save_components
from .config import ConfigError, construct, load_config
from .objectives import Objective, create
from .precision import fast_dtype

logger = logging.getLogger("unclip.training")


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
    clip_norm: float = 1.0
    gradient_accumulation: int = 1
    ema: float = 0.1  # width of the average relative to the training so far (EDM2, arXiv 2312.02696, section 3.1)
    precision: str = "auto"  # "auto", "no", "bf16" or "fp16"
    compile: bool = False
    seed: int = 0
    workers: int = 1
    log_every: int = 50
    save_every: int = 0  # steps; 0 leaves it to save_minutes
    save_minutes: float = 10.0
    keep: int = 2
    validate_every: int = 1000
    sample_every: int = 1000
    init_from: str | None = None

    def __post_init__(self):
        self.betas = tuple(self.betas)
        for name in ("max_steps", "batch_size", "gradient_accumulation", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("auto", "no", "bf16", "fp16"):
            raise ValueError(f"precision must be auto, no, bf16 or fp16, got {self.precision!r}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown must be in [0, 1], got {self.cooldown}")

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, constant, linear cool-down to zero."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        tail = self.cooldown * self.max_steps
        cool = min(1.0, (self.max_steps - step) / tail) if tail else 1.0
        return self.learning_rate * min(warm, cool)


class PowerEMA:
    """Average of the weights with a power-function profile (EDM2, arXiv 2312.02696, equations 1-4).

    beta_t = (1 - 1/t)^(gamma + 1), with gamma such that the profile's standard deviation is `width` of the training.
    """

    def __init__(self, parameters: dict[str, Tensor], width: float):
        self.shadow = {n: p.detach().clone().float() for n, p in parameters.items()}
        roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
        self.gamma = float(roots.real.max())

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor], step: int) -> None:
        """Take in the weights after step `step` (from 1)."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        shadow = [self.shadow[n] for n in parameters]
        torch._foreach_lerp_(shadow, [p.detach().float() for p in parameters.values()], 1 - beta)

    @contextmanager
    def applied(self, parameters: dict[str, Tensor]) -> Iterator[None]:
        """The averaged weights in place of the trained ones, for the length of a `with`."""
        kept = {n: p.detach().clone() for n, p in parameters.items()}
        try:
            for n, p in parameters.items():
                p.data.copy_(self.shadow[n])
            yield
        finally:
            for n, p in parameters.items():
                p.data.copy_(kept[n])


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
    sections = {k: config.pop(k) for k in ("model", "data", "objective") if k in config}
    run = construct(Run, config, "config")
    Loop(run, sections).fit()


class Loop:
    """One run: its networks, optimiser, average and log, at some step."""

    def __init__(self, run: Run, sections: dict[str, Any]):
        self.run, self.folder = run, Path(run.output_dir)
        precision = run.precision
        if precision == "auto":
            precision = "bf16" if fast_dtype() == torch.bfloat16 else "no"
        self.accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=run.gradient_accumulation)
        self.main = self.accelerator.is_main_process
        self._say(f"processes: {self.accelerator.num_processes}, device: {self.accelerator.device.type}, dtype: {precision}")
        set_seed(run.seed)
        self.objective: Objective = create(run.stage, sections, run.seed)
        self.step, self.seconds = 0, 0.0
        self.stopping = False

    # -- state

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.objective.trained.named_parameters() if p.requires_grad}

    def _setup(self) -> None:
        run, objective = self.run, self.objective
        found = self._newest()
        if found is None and run.init_from:
            self._initialise(run.init_from)
        if found is None:
            objective.prepare()
        objective.to(self.accelerator.device)
        for network in objective.trained.children():
            network.to(memory_format=torch.channels_last)
        groups = [{"params": list(named.values()), "factor": factor} for named, factor in objective.parameter_groups()]
        self.optimizer = torch.optim.AdamW(
            groups, lr=run.learning_rate, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay, fused=True
        )
        self.ema = PowerEMA(self._parameters(), run.ema) if run.ema else None
        if found is not None:
            self._restore(*found)
        if run.compile:
            objective.compile_networks()
        self.wrapped, self.prepared = self.accelerator.prepare(objective, self.optimizer)

    def _newest(self):
        for folder in checkpoints(self.folder):
            try:
                return load_checkpoint(folder)
            except (ValueError, json.JSONDecodeError, KeyError) as error:
                self._say(f"skipping a damaged checkpoint: {error}")
        return None

    def _initialise(self, source: str) -> None:
        """Start from a training run's averaged weights, or from a model: a shipped one's name, a folder, a Hub id."""
        from safetensors.torch import load_file

        folder = resolve(components_folder(source))
        for name, network in self.objective.trained.named_children():
            files = sorted((folder / name).glob("*.safetensors"))
            if not files:
                raise ConfigError(f"init_from: {folder / name} holds no .safetensors")
            network.load_state_dict({k: v.float() for f in files for k, v in load_file(f).items()})
        self._say(f"initialised from {folder}")

    @torch.no_grad()
    def _restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        self.objective.trained.load_state_dict(tensors["weights"])
        if self.ema:
            for name, shadow in self.ema.shadow.items():
                shadow.copy_(tensors["ema"][name])
        moments = tensors["optimizer"]
        for name, parameter in self._parameters().items():
            if f"{name}.step" in moments:
                # in the parameter's own memory layout: the fused optimiser walks through both side by side
                restored = {p: torch.empty_like(parameter).copy_(moments[f"{name}.{p}"]) for p in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = restored | {"step": moments[f"{name}.step"].to(parameter.device)}
        self.step, self.seconds = state["step"], state["seconds"]
        self._say(f"resuming at step {self.step}")

    def _save(self) -> None:
        if self.main:
            optimizer = {
                f"{name}.{part}": value
                for name, parameter in self._parameters().items()
                for part, value in self.optimizer.state.get(parameter, {}).items()
            }
            tensors = {"weights": self.objective.trained.state_dict(), "optimizer": optimizer}
            if self.ema:
                tensors["ema"] = self.ema.shadow
            state = {"step": self.step, "seconds": self.seconds, "samples": self.step * self._samples_per_step()}
            save_checkpoint(self.folder / f"checkpoint-{self.step:08d}", tensors, state)
            for old in checkpoints(self.folder)[self.run.keep :]:
                shutil.rmtree(old)
            self._write_components("latest")
        self.accelerator.wait_for_everyone()

    def _samples_per_step(self) -> int:
        return self.run.batch_size * self.run.gradient_accumulation * self.accelerator.num_processes

    # -- the loop

    def fit(self) -> None:
        run, accelerator = self.run, self.accelerator
        if (self.folder / "final").is_dir():
            self._say(f"{self.folder / 'final'} is there already: this run is finished")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._setup()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        batches = iter(self._loader())
        bar = tqdm(
            total=run.max_steps, initial=self.step, desc=run.stage, disable=not self.main, mininterval=5, file=sys.stderr
        )
        seen: dict[str, list[float]] = {}
        saved_at = logged_at = time.monotonic()
        self.objective.train()
        while self.step < run.max_steps and not self._stop_agreed():
            rate = run.rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            for _ in range(run.gradient_accumulation):
                with accelerator.accumulate(self.wrapped):
                    loss, metrics = self.wrapped(_to_device(next(batches), accelerator.device))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(self.objective.trained.parameters(), run.clip_norm)
                    self.prepared.step()
                    self.prepared.zero_grad()
            self.step += 1
            if self.ema:
                self.ema.update(self._parameters(), self.step)
            scalars = {"loss": loss, "grad_norm": norm} | metrics
            for key, value in scalars.items():
                seen.setdefault(key, []).append(float(value.detach()))
            if not math.isfinite(seen["loss"][-1]):
                bar.close()
                raise FloatingPointError(f"the loss of step {self.step} is not finite; last checkpoint: {self._last()}")
            bar.update()
            if self.step % run.log_every == 0 or self.step == 1:
                now = time.monotonic()
                means = {k: sum(v) / len(v) for k, v in seen.items()}
                self.seconds += now - logged_at
                speed = len(seen["loss"]) * self._samples_per_step() / (now - logged_at)
                bar.set_postfix(loss=f"{means['loss']:.4f}", images_per_s=f"{speed:.1f}", refresh=False)
                self._log("train", means | {"rate": rate, "images_per_s": speed})
                seen, logged_at = {}, now
            due = self.step == run.max_steps
            if due or (run.validate_every and self.step % run.validate_every == 0):
                self._evaluate(validate=True)
                logged_at = time.monotonic()
            if due or (run.sample_every and self.step % run.sample_every == 0):
                self._evaluate(validate=False)
                logged_at = time.monotonic()
            by_time = run.save_minutes and time.monotonic() - saved_at > 60 * run.save_minutes and not run.save_every
            if self._agreed(by_time) or (run.save_every and self.step % run.save_every == 0):
                self._save()
                saved_at = logged_at = time.monotonic()
        bar.close()
        self._save()
        if self.step < run.max_steps:
            self._say(f"stopped at step {self.step}; the same command goes on from here")
        elif self.main:
            self._finish()
        accelerator.wait_for_everyone()
        accelerator.end_training()

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
        self.objective.eval()
        if self.ema:
            with self.ema.applied(self._parameters()):
                yield
        else:
            yield
        self.objective.train()

    def _evaluate(self, validate: bool) -> None:
        """Metrics or a picture of the averaged weights, on the main process."""
        if self.main:
            with self._averaged(), self.accelerator.autocast():
                if validate:
                    metrics = self.objective.validate()
                    if metrics:
                        self._log("validation", metrics)
                else:
                    picture = self.objective.sample()
                    if picture is not None:
                        (self.folder / "samples").mkdir(exist_ok=True)
                        picture.save(self.folder / "samples" / f"{self.step:08d}.png")
        self.accelerator.wait_for_everyone()

    def _write_components(self, name: str) -> None:
        """The averaged weights as a pipeline's components, in `latest/` while the run goes on and `final/` at its end."""
        partial, target = self.folder / f"{name}.partial", self.folder / name
        shutil.rmtree(partial, ignore_errors=True)
        with self._averaged():
            save_components(partial, self.objective.components())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    def _finish(self) -> None:
        self._write_components("final")
        shutil.rmtree(self.folder / "latest", ignore_errors=True)
        self._say(f"finished: {self.folder / 'final'}")

    # -- telling and stopping

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping = True

    def _stop_agreed(self) -> bool:
        return self._agreed(self.stopping)

    def _agreed(self, flag: bool) -> bool:
        """True on every process when it is on any."""
        if self.accelerator.num_processes == 1:
            return bool(flag)
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(total.item() > 0)

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
            if kind == "validation":
                self._say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


def _leave_signals(worker: int) -> None:
    """A signal to the whole process group is for the main process, which saves and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
