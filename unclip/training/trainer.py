"""THE training loop: every stage runs through it, on one process or many, and ends as if it had never been stopped."""

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor

from ..io.checkpoints import DiskFull, no_space
from ..runtime.compiling import why_not
from ..runtime.config import ConfigError
from .batches import GlobalBatches, TrainingBatches
from .checkpointer import Checkpoint, Checkpointer
from .config import TrainConfig, read_config
from .distributed import Distributed
from .divergence import DivergenceMonitor
from .ema import PowerEMA
from .evaluator import Evaluator
from .logger import RunLogger
from .objectives import Objective, create
from .objectives.base import to_device
from .optimizers import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from .record import check_resumed, recorded_stage, run_record, write_record
from .sharding import Shards, gather_full
from .sharing import push_final
from .signals import Interrupted, StopSignals
from .starting_weights import load_starting_weights
from .step_profiler import StepProfiler
from .throughput import Throughput, flops_per_sample

Sections = dict[str, dict[str, Any]]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config_path: str | Path, overrides: list[str]) -> None:
    """Train the stage that a configuration names, or resume it where its output folder left off.

    Raises ConfigError, FloatingPointError for a loss or gradient that is not finite or a loss that explodes, and DiskFull,
    the last two in one line that names the last good checkpoint.
    """
    config, sections = read_config(config_path, overrides)
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file")
    distributed = Distributed(config)
    checkpointer = Checkpointer(folder, config.keep, distributed)
    if checkpointer.is_finished(config.max_steps):
        stage = recorded_stage(folder)
        if stage not in (None, config.stage):
            raise ConfigError(f"output_dir {folder} holds a finished run of the stage {stage}, not {config.stage}")
        distributed.report(f"{folder / 'final'} is there already: this run is finished")
        return
    trainer: Trainer | None = None
    try:
        objective = create_objective(config, sections, distributed)
        with checkpointer.locked():
            checkpointer.begin()
            try:
                trainer = Trainer(config, sections, objective, distributed, checkpointer)
                trainer.fit()
            finally:
                checkpointer.close()
    except (OSError, SafetensorError) as error:
        reason = str(error) if isinstance(error, DiskFull) else no_space(error)
        if reason is None:
            raise
        step = trainer.step if trainer else 0
        raise DiskFull(f"step {step}: {reason}; last checkpoint: {checkpointer.last()}") from None
    distributed.end()


def create_objective(config: TrainConfig, sections: Sections, distributed: Distributed) -> Objective:
    """The examples and networks of a run's stage. Raises ConfigError for what cannot be trained as configured."""
    set_seed(config.seed)
    objective = create(config.stage, sections, config.seed)
    if distributed.sharding and not objective.shardable:
        raise ConfigError(f"the stage {config.stage} cannot be trained in parts: leave sharding {distributed.sharding} out")
    if objective.lora and not config.init_from:
        raise ConfigError("objective.lora adapts trained weights: name them by init_from=")
    if config.compile and (reason := why_not(distributed.device)):
        raise ConfigError(f"compile=true: {reason}")
    return objective


class Trainer:
    """A run at step `step`: starting weights, optimizer, average and log, restored from its newest checkpoint if it has one.

    `fit` trains it to its end.
    """

    def __init__(
        self,
        config: TrainConfig,
        sections: Sections,
        objective: Objective,
        distributed: Distributed,
        checkpointer: Checkpointer,
    ):
        self.config, self.objective = config, objective
        self.distributed, self.checkpointer = distributed, checkpointer
        self.samples_per_step = distributed.samples_per_step(config)
        self.record = run_record(config, sections, objective)
        checkpoint = checkpointer.load_newest()
        if checkpoint is not None:
            self._check_resumed(checkpoint)
        load_starting_weights(objective, config, checkpoint, distributed)
        flops = flops_per_sample(objective, config.batch_size)
        self.shards = self._place_networks()
        self.optimizer = build_optimizer(config, objective, distributed.precision)
        averages = bool(config.ema or config.ema_decay)
        self.ema = PowerEMA(objective.trained_parameters(), config.ema, config.ema_decay) if averages else None
        self.monitor = DivergenceMonitor(config, distributed, checkpointer)
        self.step = 0
        dtype = DTYPES[distributed.precision]
        self.throughput = Throughput(self.samples_per_step, distributed.processes, distributed.device, dtype, flops)
        if checkpoint is not None:
            self._resume(checkpoint)
        if config.compile:
            objective.compile_networks()
        self.wrapped, self.wrapped_optimizer = distributed.prepare(objective, self.optimizer)
        self.evaluator = Evaluator(objective, self.ema, self.shards, checkpointer, distributed)
        self.logger = RunLogger(config, {**vars(config), **sections}, distributed, self.step)
        distributed.run_on_main(lambda: write_record(checkpointer.folder, self.record))
        self.signals = StopSignals()
        self.profiler = StepProfiler(config.profile_steps, checkpointer.folder, distributed.rank, distributed.device)

    def _place_networks(self) -> Shards | None:
        """Put the networks on the device, in channels_last or, where they are sharded, in shards."""
        objective, distributed = self.objective, self.distributed
        if self.config.gradient_checkpointing:
            objective.checkpoint_activations()
        sharding = distributed.sharding
        shards = Shards(objective, distributed.device, sharding, distributed.is_main) if sharding else None
        objective.to(distributed.device)
        if shards is None:  # FSDP2 takes no other layout than contiguous
            networks: Iterable[Any] = objective.trained.children()
            for network in networks:
                network.to(memory_format=torch.channels_last)
        return shards

    def _check_resumed(self, checkpoint: Checkpoint) -> None:
        """Report the settings that a resumed run changes. Raises ConfigError for those that make it another run."""
        before = checkpoint.state.get("record")
        if before is not None:  # version 0.1 recorded nothing
            changed = check_resumed(before, self.record, checkpoint.origin, self.config.resume_changed)
            if changed:
                self.distributed.report(f"resumed with other settings: {'; '.join(changed)}")

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Restore the average, the optimizer and the step; the weights are restored already."""
        state = checkpoint.state
        try:
            if self.ema:
                self.ema.load(checkpoint.tensors.get("ema", {}))
            load_optimizer_state(self.optimizer, self.objective.trained_parameters(), checkpoint.tensors["optimizer"])
        except ValueError as error:
            raise ConfigError(f"{checkpoint.origin} {error}") from None
        scaler = self.distributed.accelerator.scaler
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        self.step, self.throughput.seconds = state["step"], state["seconds"]
        self.monitor.load(state.get("recent", []))
        self.distributed.report(f"resuming at step {self.step}")
        if state["samples"] != self.step * self.samples_per_step:
            before = state["samples"] // max(self.step, 1)
            self.distributed.report(
                f"a step had {before} examples and has {self.samples_per_step} now: this is not the run it was"
            )

    def fit(self) -> None:
        """Train to `max_steps`, or until a signal says to stop. Raises FloatingPointError and DiskFull, as `train`."""
        with self.signals:
            try:
                self.signals.immediate = self.config.compile
                self._train()
                self.save()
                self.checkpointer.wait()
            except Interrupted:  # no step was taken
                self.checkpointer.close()
            self._end()

    def _train(self) -> None:
        """Take steps until `max_steps` or a signal; log, validate, sample and save on the way."""
        config, distributed = self.config, self.distributed
        sampler = GlobalBatches(config, self.step, distributed.rank, distributed.processes)
        saved_at, stopping = time.monotonic(), False
        self.objective.train()
        with self.logger, self.profiler, TrainingBatches(self.objective.examples, sampler) as batches:
            self.throughput.start()
            while self.step < config.max_steps and not stopping:
                self.profiler.before(self.step + 1)
                self.logger.collect(self.train_step(batches))
                self.signals.immediate = False
                self.profiler.after(self.step)
                self.throughput.step()
                if self._is_due(config.log_every) or self.step == 1:
                    self._log(batches.waited)
                with self.throughput.paused():
                    self._evaluate()
                    by_time = not config.save_every and 0 < 60 * config.save_minutes < time.monotonic() - saved_at
                    stopping, by_time = distributed.any(self.signals.received, by_time)
                    if by_time or self._is_due(config.save_every):
                        self.save()
                        saved_at = time.monotonic()
                        (stopping,) = distributed.any(stopping or self.signals.received)
        self.signals.immediate = False

    def _end(self) -> None:
        """Write `final/`, or say that the run can be resumed."""
        folder = self.checkpointer.folder
        if self.step < self.config.max_steps:
            self.distributed.report(f"stopped at step {self.step}; the same command goes on from here")
            return
        self.evaluator.write("final")
        self.checkpointer.finish()
        self.distributed.report(f"finished: {folder / 'final'}")
        if (repository := self.config.push_to_hub) and self.distributed.is_main:
            push_final(folder / "final", repository, self.distributed.report)

    def _is_due(self, every: int) -> bool:
        """Whether this step is one of `every`; 0 is never."""
        return every > 0 and self.step % every == 0

    def train_step(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """One step of the optimizer and of the average; -> the scalars to log of each backward pass.

        On a CPU raises FloatingPointError before the weights change. Nothing is read from another device.
        """
        accelerator, parts = self.distributed.accelerator, self.config.gradient_accumulation
        set_learning_rate(self.optimizer, self.config.learning_rate_at(self.step))
        passes: list[dict[str, Tensor]] = []
        for part in range(parts):
            self._seed_dropout(self.step * parts + part)
            if self.shards:
                self.shards.set_gradient_sync(part == parts - 1)
            with accelerator.accumulate(self.wrapped):
                loss, metrics = self.wrapped(to_device(next(batches), self.distributed.device))
                accelerator.backward(loss)
                passes.append({"loss": loss.detach()} | {k: v.detach() for k, v in metrics.items()})
                if accelerator.sync_gradients:
                    norm = self._clip_gradients()
                    self.monitor.record(self.step, [p["loss"] for p in passes], norm)
                    passes[-1]["grad_norm"] = norm
                self.wrapped_optimizer.step()
                self.wrapped_optimizer.zero_grad()
        self.step += 1
        if self.ema:
            self.ema.update(self.objective.trained_parameters(), self.step)
        return passes

    def _seed_dropout(self, number: int) -> None:
        """Seed dropout by the number of the backward pass and the process, so that a resumed run draws the same."""
        number = number * self.distributed.processes + self.distributed.rank
        torch.manual_seed((self.config.seed * 1_000_003 + number) % 2**63)

    def _clip_gradients(self) -> Tensor:
        """Clip the gradients' norm to `clip_norm`; -> the norm before."""
        parameters = self.objective.trained.parameters()
        return gather_full(self.distributed.accelerator.clip_grad_norm_(parameters, self.config.clip_norm or math.inf))

    def _log(self, waited: float) -> None:
        """Log the means since the last log line; `waited` are the seconds for which batches were waited for in all."""
        self.monitor.check()
        means, speed = self.logger.means(), self.throughput.lap(waited)
        rate = {"rate": self.config.learning_rate_at(self.step - 1)}
        self.logger.log("train", self.step, self.throughput.seconds, means | rate | speed)

    def _evaluate(self) -> None:
        """Validate and sample, when it is time for either and after the last step."""
        last = self.step == self.config.max_steps
        if self.config.validate_every and (last or self._is_due(self.config.validate_every)):
            self.monitor.check()
            if metrics := self.evaluator.validate():
                self.logger.log("validation", self.step, self.throughput.seconds, metrics)
        if self.config.sample_every and (last or self._is_due(self.config.sample_every)):
            self.monitor.check()
            self.evaluator.sample(self.step)

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one, and write `latest/`. DiskFull ends every process."""
        self.monitor.check()
        if self.checkpointer.saved_step == self.step:
            return
        self.checkpointer.save(self._tensors(), self._state())
        self.evaluator.write("latest")

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds: weights, optimizer state and average; of an adapted network the adapter alone.

        Shards are gathered by all processes together; the other processes' result is empty.
        """
        objective, is_main = self.objective, self.distributed.is_main
        if not (is_main or self.shards):
            return {}
        parameters = objective.trained_parameters()
        tensors = {"weights": dict(parameters) if objective.lora else objective.trained.state_dict()}
        tensors["optimizer"] = optimizer_state(self.optimizer, parameters)
        if self.ema:
            tensors["ema"] = self.ema.shadow
        return {kind: {name: gather_full(v, is_main) for name, v in content.items()} for kind, content in tensors.items()}

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.throughput.seconds,
            "samples": self.step * self.samples_per_step,
        }
        state |= {"init_from": self.config.init_from, "recent": list(self.monitor.recent), "record": self.record}
        scaler = self.distributed.accelerator.scaler
        return state | ({"scaler": scaler.state_dict()} if scaler is not None else {})
