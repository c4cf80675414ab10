"""The training loop of `sprint.py`: a stage's own losses on batches that its device makes, until a time."""

# B batch

import argparse
import json
import math
import sys
import threading
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sprint_pack import BANK, icon_tables, unpack
from sprint_shards import write_shards
from torch import Tensor, nn

from prior.storage import read_weights
from unclip.data.bank import PlanBank
from unclip.data.bank_scenes import BankScenes
from unclip.data.icons import IconSet
from unclip.diffusion.schedules import move_schedule
from unclip.runtime.compiling import why_not
from unclip.runtime.precision import best_device
from unclip.runtime.profiling import flop_counter, measured_peak
from unclip.runtime.random import Stream, normal, uniform
from unclip.training.ema import PowerEMA
from unclip.training.muon import Muon, hidden_matrices
from unclip.training.objectives import Objective, create

BATCHES = {"decoder": 512, "prior": 2048, "draft": 2048}
TINY_BATCH = 16
REPORT, SAVE = 20.0, 30.0  # seconds between two lines, and between two saves
AHEAD = 2  # steps that the host may be ahead of the device
COUNTED = 8  # examples of the step whose operations are counted
LEAST_RESERVE = 2.0  # seconds kept for the end, beside those of two saves


class SceneBatches:
    """Batches of scenes from a bank of plans, as `objective.compute_loss` takes them, made on `device` without host reads."""

    def __init__(self, objective: Objective, bank: PlanBank, icons: IconSet, seed: int, device: torch.device):
        self.objective, self.scenes = objective, BankScenes(bank, icons.sprites, seed).to(device)
        self.make = self.scenes
        move_schedule(objective.schedule, device)
        self.grounded = bool(getattr(objective, "grounding", 0))
        if self.grounded:
            self._embed(icons, device)

    @torch.no_grad()
    def _embed(self, icons: IconSet, device: torch.device) -> None:
        """Ask CLIP for the embeddings of all icons, that no step has to."""
        table = self.objective.icon_embeds
        found = [self.objective.frozen.image(icons.on_white(rows).to(device) * 2 - 1) for rows in _groups(len(icons), 512)]
        table.embeds, table.known = torch.cat(found), torch.ones_like(table.known)

    def compile(self, wanted: bool) -> None:
        """Whether the making of scenes is compiled."""
        self.make = torch.compile(self.scenes, dynamic=False) if wanted else self.scenes

    @torch.no_grad()
    def __call__(self, step: int, indices: Tensor) -> dict[str, Tensor]:
        batch, objective = dict(self.make(indices)), self.objective
        if self.grounded and step % objective.grounding_every == 0:
            batch["icon_embeds"] = objective.icon_embeds(batch["rows"])
        else:
            del batch["names"]
        if getattr(objective, "icon_bank", None) is not None:
            batch["sampled_embeds"] = objective.icon_bank.sampled(batch["icon"].clamp_min(0), batch["random"][:, 11])
        return batch


class IconBatches:
    """Batches of single icons, drawn as `SingleIcons` draws them but on `device`."""

    def __init__(self, objective: Objective, seed: int, device: torch.device):
        self.objective, self.seed, examples = objective, seed, objective.examples
        self.cumulative, self.styles = torch.from_numpy(examples.cumulative).to(device), examples.styles.to(device)

    def compile(self, wanted: bool) -> None:
        """A few look-ups are left as they are."""

    @torch.no_grad()
    def __call__(self, step: int, indices: Tensor) -> dict[str, Tensor]:
        random = uniform(self.seed, Stream.SCENE_PLACE, indices, 5)
        rows = torch.searchsorted(self.cumulative, random[:, 0].double(), right=True).clamp_max(len(self.styles) - 1)
        return self.objective.to_tensors({"index": indices, "row": rows, "style": self.styles[rows], "random": random[:, 1:]})


def _groups(count: int, size: int) -> list[range]:
    return [range(n, min(n + size, count)) for n in range(0, count, size)]


def noise_on_device(objective: Objective) -> None:
    """Have the objective draw its noise by counter-based numbers, where its examples are, in place of a generator for each."""

    def drawn(seed: int, indices: Tensor, like: Tensor) -> Tensor:
        return normal(seed, Stream.NOISE, indices, *like.shape[1:]).to(like)

    for kind in type(objective).__mro__:
        module = sys.modules[kind.__module__]
        if hasattr(module, "seeded_noise"):
            module.seeded_noise = drawn


class Sprint:
    """One run from `started` to `deadline`, in seconds of time.monotonic()."""

    def __init__(self, options: argparse.Namespace, started: float, deadline: float):
        self.options, self.started, self.deadline = options, started, deadline
        self.out, self.device = options.out, best_device()
        self.step, self.stopping, self.writer = 0, threading.Event(), None
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        self.ends: list[Any] = []  # events at the ends of the last steps
        self.making: list[Any] = []  # what the batches since the last line took: seconds, or pairs of events
        self.save_seconds, self.objective = 0.0, None

    def stop(self) -> None:
        self.stopping.set()

    # -- set-up

    def set_up(self) -> None:
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        whole, self.settings = unpack(self.options.inputs)
        if self.settings["stage"] != self.options.stage:
            raise ValueError(f"{self.options.inputs} was packed for the stage {self.settings['stage']}")
        self.config = self.settings["config"]
        self.seed = self.config.get("seed", 0)
        torch.manual_seed(self.seed)
        self.objective = objective = create(self.options.stage, self._sections(whole), self.seed)
        if getattr(objective, "icon_bank", None) is not None:
            objective.icon_bank.take(**icon_tables(whole))
        self._start_weights(whole / "model")
        objective.to(self.device).train()
        for network in objective.trained.children():
            network.to(memory_format=torch.channels_last)
        noise_on_device(objective)
        self.batch = self.options.batch or (TINY_BATCH if self.options.tiny else BATCHES[self.options.stage])
        self.batches = self._batches(whole)
        self.parameters = {n: p for n, p in objective.trained.named_parameters() if p.requires_grad}
        self.rate = self.options.rate or self.config["learning_rate"]
        self.optimizer, self.average = self._optimizer(), PowerEMA(self.parameters, self.config.get("ema", 0.1))
        self.peak = measured_peak(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.flops = self._count()
        wanted = self.options.compile if self.options.compile is not None else self.device.type == "cuda"
        if wanted and (reason := why_not(self.device)) is None:
            objective.compile_networks()
            self.batches.compile(True)
        elif wanted:
            self._say({"kind": "note", "text": f"not compiled: {reason}"})
        self.save(wait=True)
        facts = {"device": self._device_name(), "torch": torch.__version__, "batch": self.batch, "rate": self.rate}
        facts |= {"parameters": sum(p.numel() for p in self.parameters.values()), "peak_tflops": self.peak / 1e12}
        self._say({"kind": "start", **facts, "compiled": objective.compiled, "gflop_per_example": self.flops / 1e9})

    def _sections(self, whole: Path) -> dict[str, dict[str, Any]]:
        """The configuration's sections, of the unpacked inputs. A bank has its scenes' settings in it."""
        sections = {name: dict(self.config.get(name) or {}) for name in ("model", "data", "objective")}
        banked = ("path", "all_concepts", "single_pose")
        kept = sections["data"] if self.options.stage == "draft" else {k: v for k, v in sections["data"].items() if k in banked}
        sections["data"] = kept | {"path": str(whole / "data")}
        sections["objective"]["clip"] = str(whole / "model")
        if sections["objective"].get("prior"):
            sections["objective"]["prior"] = str(whole / "model")
        return sections

    def _start_weights(self, model: Path) -> None:
        """The packed weights; from scratch, only of what is not trained: statistics, and a frozen head."""
        objective, missing = self.objective, []
        for name, network in objective.trained.named_children():
            files = sorted((model / name).glob("*.safetensors"))
            missing += [] if files else [name]
            state = {k: v.float() for file in files for k, v in read_weights(file).items()}
            if files:
                state = objective.starting_weights(name, state)
                if self.options.from_scratch:
                    trained = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
                    state |= trained
                network.load_state_dict(state)
        if missing and not self.options.from_scratch:
            raise FileNotFoundError(f"the packed model holds no {missing[0]}: pack one that does, or train --from-scratch")

    def _batches(self, whole: Path) -> SceneBatches | IconBatches:
        if self.options.stage == "draft":
            return IconBatches(self.objective, self.seed, self.device)
        bank = PlanBank.load(whole / BANK)
        return SceneBatches(self.objective, bank, IconSet.load(whole / "data"), self.seed, self.device)

    def _optimizer(self) -> torch.optim.AdamW:
        config, muon = self.config, self.config.get("optimizer") == "muon"
        hidden, groups = set(hidden_matrices(self.objective.trained)) if muon else set(), []
        for named, factor in self.objective.parameter_groups():
            for of_muon in (False, True):
                chosen = [p for n, p in named.items() if (n in hidden) == of_muon]
                groups += [{"params": chosen, "factor": factor, "muon": of_muon}] if chosen else []
        settings = {"lr": self.rate, "betas": tuple(config.get("betas", (0.9, 0.99))), "eps": config.get("eps", 1e-8)}
        settings |= {"weight_decay": config.get("weight_decay", 0.0), "fused": True}
        if not muon:
            return torch.optim.AdamW(groups, **settings)
        return Muon(groups, torch.bfloat16 if self.device.type == "cuda" else torch.float32, **settings)

    def _count(self) -> float:
        """Floating-point operations of an example, forward and backward, frozen networks included."""
        count = min(COUNTED, self.batch)
        batch = self.batches(0, torch.arange(count, device=self.device))
        with flop_counter() as counter:
            with self._autocast():
                loss, _ = self.objective.compute_loss(batch)
            loss.backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops() / count

    def _autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

    # -- training

    def train(self) -> None:
        """Train until what is left of the time is needed to save."""
        self.training_since = reported = saved = time.monotonic()
        self.reported_step = 0
        every = min(SAVE, (self.deadline - self.training_since) / 4)
        while (now := time.monotonic()) < self._end() and not self.stopping.is_set():
            self._take_step(now)
            if self.step == 1 and self.objective.compiled:
                self._say({"kind": "note", "text": f"the first step, with compilation, took {time.monotonic() - now:.1f} s"})
            if (now := time.monotonic()) - reported >= min(REPORT, every):
                self._report(now - reported)
                reported = now
            if now - saved >= every:
                self.save()
                saved = now
        if self.step > self.reported_step:
            self._report(time.monotonic() - reported)
        self.save(wait=True)
        self._say({"kind": "end", "step": self.step, "examples": self.step * self.batch})

    def _end(self) -> float:
        """When to stop training: the time of two saves and a little before the deadline."""
        return self.deadline - LEAST_RESERVE - 2 * self.save_seconds

    def rate_at(self, now: float) -> float:
        """The learning rate: a linear warm-up by steps, then constant, then linear to zero at the end of the time."""
        warm = min(1.0, (self.step + 1) / max(min(self.config.get("warmup_steps", 500), 200), 1))
        left = (self._end() - now) / max(self._end() - self.training_since, 1e-9)
        return self.rate * min(warm, max(left, 0.0) / max(self.config.get("cooldown", 0.2), 1e-9), 1.0)

    def _take_step(self, now: float) -> None:
        rate = self.rate_at(now)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        try:
            loss, metrics = self._passes()
        except Exception as error:
            if not self.objective.compiled or self.step > 1:
                raise
            self._leave_uncompiled(error)
            loss, metrics = self._passes()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.get("clip_norm", 1.0) or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.average.update(self.parameters, self.step)
        for name, value in {"loss": loss, **metrics, "grad_norm": norm}.items():
            self.seen[name].append(value.detach())
        if self.device.type == "cuda":
            self.ends.append(self._moment())
            if len(self.ends) > AHEAD:
                self.ends.pop(0).synchronize()

    def _passes(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this step's batch and what to log; its gradients are in the weights."""
        first = self.step * self.batch
        start = self._moment()
        batch = self.batches(self.step, torch.arange(first, first + self.batch, device=self.device))
        self.making.append((start, self._moment()))
        with self._autocast():
            loss, metrics = self.objective.compute_loss(batch)
        loss.backward()
        return loss, metrics

    def _leave_uncompiled(self, error: Exception) -> None:
        """Go on without what does not compile."""
        self._say({"kind": "note", "text": f"not compiled: {type(error).__name__}: {str(error)[:300]}"})
        del self.objective.compute_loss  # what remains is the class's own
        self.objective.compiled = False
        self.batches.compile(False)
        self.optimizer.zero_grad()
        self.making.clear()

    def _moment(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # -- logging and saving

    def _report(self, seconds: float) -> None:
        """A line of the log, with the means since the last one."""
        means = {name: torch.stack(values).float().nanmean().item() for name, values in self.seen.items()}  # waits
        made = sum(a.elapsed_time(b) / 1000 if hasattr(a, "elapsed_time") else b - a for a, b in self.making)
        steps = self.step - self.reported_step
        speed = steps * self.batch / seconds
        row = {"kind": "train", "step": self.step, "examples": self.step * self.batch, "step_s": seconds / steps}
        row |= {"data_wait_s": made / steps, "examples_per_s": speed, "tflops": speed * self.flops / 1e12}
        row |= {"mfu": speed * self.flops / self.peak, "rate": self.rate_at(time.monotonic())}
        if self.device.type == "cuda":
            row["peak_memory"] = torch.cuda.max_memory_allocated()
        self._say(row | {name: value for name, value in means.items() if not math.isnan(value)})
        self.seen.clear()
        self.making.clear()
        self.reported_step = self.step
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is not finite at step {self.step}")

    def save(self, wait: bool = False) -> None:
        """Write the averaged weights, in a thread unless it is to `wait`.

        Raises FloatingPointError, and keeps what was written before, where one is not finite.
        """
        start = time.monotonic()
        weights = dict(self.objective.trained.state_dict()) | self.average.shadow
        if not torch.stack([w.isfinite().all() for w in weights.values()]).all():
            raise FloatingPointError(f"the averaged weights are not finite at step {self.step}; those saved before are kept")
        halves = {n: (w.half() if w.is_floating_point() else w).cpu() for n, w in weights.items()}
        if self.writer is not None:
            self.writer.join()
        about = {name: self.settings[name] for name in ("stage", "model", "config")}
        self.writer = threading.Thread(target=write_shards, args=(self.out, halves, about, self.step))
        self.writer.start()
        if wait:
            self.writer.join()
            self.save_seconds = max(self.save_seconds, time.monotonic() - start)

    def save_after_failure(self) -> None:
        """Keep the last weights of a run that failed; where those cannot be had, the ones that were saved before stay."""
        try:
            if self.step:
                self.save(wait=True)
        except Exception as error:
            print(f"the last weights could not be saved: {error}", flush=True)

    def _say(self, row: dict[str, Any]) -> None:
        row = {"seconds": time.monotonic() - self.started} | row
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
