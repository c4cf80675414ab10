"""What a training run will take: parameters, work, memory and time, counted without a weight being allocated.

The networks are built of tensors without storage (torch's fake tensors, on the meta device's rules), run forward and
backward once on a dummy batch, and every operation's products and every tensor's life are counted. So a 3.5B decoder plans
on a laptop.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from .. import networks
from ..io.images import SUFFIXES
from ..runtime import attention
from ..runtime.config import ConfigError
from ..runtime.precision import fast_dtype
from .config import TrainConfig, read_config
from .counting import Measured, measure
from .objectives import Objective
from .planned_objective import PlannedCLIP, is_clip_conditioned, plan_clip, plan_objective

# Dense bf16 TFLOP/s of one A100, and of two cores with AVX512-BF16 on this package's convolutions; and the share of it
# that a training run keeps.
PEAK_TFLOPS = {"gpu": 312.0, "cpu": 0.7}
UTILISATION = {"gpu": 0.35, "cpu": 0.7}
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's own context and the allocator's gaps
JPEG_BYTES = 0.3  # of a stored image per pixel, where there is no folder to measure
FP32 = 4
CACHED = ("text_embeds", "encodings", "image_embeds")  # what a sample reads from an embedding cache, in fp16
UPSAMPLERS = {"super_res_first": "upsampler", "upsampler_1024": "upsampler"}  # names in the report
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Strategy:
    """The bytes on one GPU under one way of training."""

    name: str
    weights: int
    ema: int
    optimiser: int
    gradients: int
    activations: int
    frozen: int

    @property
    def total(self) -> int:
        return sum(v for v in vars(self).values() if isinstance(v, int))


@dataclass
class Plan:
    """What `unclip plan` answers. FLOPs are of one sample, times of all steps."""

    stage: str
    parameters: dict[str, int]
    trained: int  # of them
    frozen_parameters: int | None  # None: the CLIP is not here to be counted
    forward_flops: int  # without the frozen CLIP's
    training_flops: int
    checkpointed_flops: int | None  # None: the networks cannot recompute their activations
    steps: int
    batch: int  # samples of one backward pass on one GPU
    global_batch: int
    precision: str
    gpus: int
    memory: int  # of one GPU, bytes
    strategies: list[Strategy]
    tflops: float
    utilisation: float
    read_bytes: int
    read_basis: str
    notes: list[str] = field(default_factory=list)

    @property
    def examples(self) -> int:
        return self.steps * self.global_batch

    def device_days(self, checkpointed: bool = False) -> float:
        """Days of one GPU (or of the CPU) for all steps."""
        flops = self.checkpointed_flops if checkpointed else self.training_flops
        return self.examples * (flops or 0) / (self.tflops * 1e12 * self.utilisation) / 86400

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        found = {k: v for k, v in vars(self).items() if k != "strategies"}
        found["strategies"] = [vars(s) | {"total": s.total} for s in self.strategies]
        return found | {"examples": self.examples, "device_days": self.device_days()}


@dataclass
class _Counts:
    """A stage's networks, and its passes measured at the configuration's batch size."""

    objective: Objective
    forward: Measured
    training: Measured
    checkpointed: Measured | None


def plan(
    config_path: str | Path,
    overrides: list[str],
    gpus: int = 1,
    memory: int = 80 * 10**9,
    tflops: float | None = None,
    utilisation: float | None = None,
) -> Plan:
    """The plan of the stage that a configuration names, on `gpus` GPUs of `memory` bytes each; with 0 GPUs, on this CPU.

    Raises ConfigError for a configuration that could not be trained.
    """
    if gpus < 0:
        raise ConfigError(f"the number of GPUs must be at least 0, got {gpus}")
    config, sections = read_config(config_path, overrides)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if gpus or fast_dtype("cpu") == torch.bfloat16 else "no"
    with FakeTensorMode(allow_non_fake_inputs=True):
        conditioned = is_clip_conditioned(config.stage)
        clip = plan_clip(config.stage, sections, config_path) if conditioned else None
        counts = _count(config, plan_objective(config.stage, sections, clip), DTYPES[precision], gpus)
    is_unknown = conditioned and not isinstance(clip, PlannedCLIP) and not sections["data"].get("embeddings")
    notes = ["FSDP is sharding=zero3"] * (gpus > 1)
    if is_unknown:
        notes.append(f"the CLIP {sections['objective'].get('clip')!r} is not here: neither its weights nor its work count")
    frozen = parameter_count(clip.towers) if isinstance(clip, PlannedCLIP) else 0
    trained, size, checkpointed = counts.objective.trained, config.batch_size, counts.checkpointed
    kind, global_batch = "gpu" if gpus else "cpu", size * config.gradient_accumulation * max(gpus, 1)
    read, basis = _read_bytes(sections["data"], counts.objective)
    return Plan(
        stage=config.stage,
        parameters={UPSAMPLERS.get(name, name): parameter_count(network) for name, network in trained.named_children()},
        trained=parameter_count(trained, learned=True),
        frozen_parameters=None if is_unknown else frozen,
        forward_flops=(counts.forward.flops - counts.forward.frozen_flops) // size,
        training_flops=counts.training.flops // size,
        checkpointed_flops=checkpointed.flops // size if checkpointed else None,
        steps=config.max_steps,
        batch=size,
        global_batch=global_batch,
        precision=precision,
        gpus=gpus,
        memory=memory,
        strategies=list(_strategies(counts, frozen, gpus, bool(config.ema or config.ema_decay))),
        tflops=tflops or PEAK_TFLOPS[kind],
        utilisation=utilisation or UTILISATION[kind],
        read_bytes=read * config.max_steps * global_batch,
        read_basis=basis,
        notes=notes,
    )


def _count(config: TrainConfig, objective: Objective, dtype: torch.dtype | None, gpus: int) -> _Counts:
    """Measure the passes of an objective, with the attention that a GPU has where there are any."""
    if gpus:
        for network in objective.trained.children():
            attention.install(network, "sdpa")
    training = measure(objective, config.batch_size, dtype, on_gpu=gpus > 0)
    with torch.no_grad():
        forward = measure(objective, config.batch_size, dtype, on_gpu=gpus > 0)
    able = [networks.recompute_activations(network) for network in objective.trained.children()]
    objective.train()
    checkpointed = measure(objective, config.batch_size, dtype, on_gpu=gpus > 0) if any(able) else None
    return _Counts(objective, forward, training, checkpointed)


def parameter_count(module: nn.Module, learned: bool = False) -> int:
    """Parameters; `learned` ones alone where it is set."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learned)


def _strategies(counts: _Counts, frozen: int, gpus: int, ema: bool) -> Iterator[Strategy]:
    trained = counts.objective.trained
    parameters, learned = parameter_count(trained), parameter_count(trained, learned=True)
    passes = [("", counts.training)]
    passes += [(", activation checkpointing", counts.checkpointed)] if counts.checkpointed else []
    together = "DDP" if gpus > 1 else "one GPU" if gpus else "CPU"
    buckets = learned if gpus > 1 else 0  # DDP reduces gradients in buckets that are copies of them
    for suffix, found in passes:
        gradients = found.total - found.activations  # the share of them that is there when memory is fullest
        yield Strategy(
            together + suffix,
            weights=parameters * FP32,
            ema=learned * FP32 * ema,
            optimiser=2 * learned * FP32,
            gradients=gradients + buckets * FP32,
            activations=found.activations,
            frozen=frozen * FP32,
        )
    if gpus < 2:
        return
    lists = (m for m in trained.modules() if isinstance(m, nn.ModuleList))
    largest = max((parameter_count(block) for m in lists for block in m.children()), default=parameters)
    for suffix, found in passes:
        yield Strategy(
            "FSDP" + suffix,
            weights=parameters * FP32 // gpus + 2 * largest * FP32,  # the running block and the next one are gathered
            ema=learned * FP32 * ema // gpus,
            optimiser=2 * learned * FP32 // gpus,
            gradients=learned * FP32 // gpus + largest * FP32,
            activations=found.activations,
            frozen=frozen * FP32,
        )


def _read_bytes(data: dict[str, Any], objective: Objective) -> tuple[int, str]:
    """Bytes that one sample reads, and how that is known."""
    with unset_fake_temporarily():
        batch = objective.dummy_batch(1)
    if data.get("embeddings"):
        return 2 * sum(batch[name].numel() for name in CACHED), "an embedding cache in fp16, every token counted"
    path = Path(str(data.get("path", "")))
    sizes = [p.stat().st_size for _, p in zip(range(200), _images(path), strict=False)]
    if sizes:
        return sum(sizes) // len(sizes), f"the mean file of {path}"
    # an upsampler's example is a crop of an image of `size` pixels; some batches have no images, or other ones
    read = batch.get("image", torch.zeros(0))
    side = getattr(objective, "size", 0) or (read.shape[-1] if read.dtype == torch.uint8 else objective.examples.size)
    return round(side * side * JPEG_BYTES), f"JPEG of {side} px a side at {JPEG_BYTES} bytes a pixel, assumed"


def _images(path: Path) -> Iterator[Path]:
    return (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else iter(())
