"""What a training run will take: parameters, work, memory and time, counted without a weight being allocated.

The networks are built of tensors without storage (torch's fake tensors, on the meta device's rules), run forward and
backward once, and every operation's products and every tensor's life are counted. So a 3.5B decoder plans on a laptop.
"""

# B batch, D embedding dimension, N text tokens, S side of a picture in pixels

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from decoder import expand_to_context
from decoder.blocks import ChannelNorm

from .. import networks
from ..clip.judge import JudgeImageTower, JudgeTextTower, word_tokenizer
from ..data.scenes import IconSet
from ..io.checkpoints import check_folder, components_folder, resolve
from ..io.images import SUFFIXES
from ..runtime import attention
from ..runtime.config import ConfigError, construct, load_config, nearest, shipped
from ..runtime.precision import fast_dtype
from ..runtime.profiling import flop_counter
from .config import read_config
from .objectives.conditioned import LoRA, add_adapter
from .objectives.decoder_distill import ADAPTER
from .objectives.judge import icons_path, vocabulary

# Dense bf16 TFLOP/s of one A100, and of two cores with AVX512-BF16 on this package's convolutions; and the share of it
# that a training run keeps.
PEAK_TFLOPS = {"gpu": 312.0, "cpu": 0.7}
UTILISATION = {"gpu": 0.35, "cpu": 0.7}
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's own context and the allocator's gaps
JPEG_BYTES = 0.3  # of a stored picture per pixel, where there is no folder to measure
FP32 = 4
NORMS = (nn.GroupNorm, nn.LayerNorm, ChannelNorm)
CONDITIONED = ("prior", "prior_autoregressive", "text_proj", "draft", "decoder", "decoder_distill")  # against a frozen CLIP


@dataclass
class Measured:
    """One forward and backward pass: floating-point operations, and the bytes alive beside weights and gradients."""

    flops: int
    activations: int  # the most that is alive at once, without the parameters' gradients
    total: int  # the same with them


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
    """What `unclip plan` answers. FLOPs are of one sample, times of the whole run."""

    stage: str
    parameters: dict[str, int]
    trained: int  # of them
    frozen_parameters: int | None  # None: the CLIP is not here to be counted
    forward_flops: int
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
        return self.examples * flops / (self.tflops * 1e12 * self.utilisation) / 86400

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        found = {k: v for k, v in vars(self).items() if k != "strategies"}
        found["strategies"] = [vars(s) | {"total": s.total} for s in self.strategies]
        return found | {"examples": self.examples, "device_days": self.device_days()}


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
    run, sections = read_config(config_path, overrides)
    precision = run.precision
    if precision == "auto":
        precision = "bf16" if gpus or fast_dtype("cpu") == torch.bfloat16 else "no"
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    kind = "gpu" if gpus else "cpu"
    notes, unknown = [], False
    if gpus > 1:
        notes.append("FSDP is sharding=zero3")
    with FakeTensorMode():
        frozen = None if run.stage not in CONDITIONED else _clip(sections, config_path)
        stage = _stage(run.stage, sections, frozen)
        adapter = sections["objective"].get("lora")
        if run.stage == "decoder_distill":
            adapter = ADAPTER | (adapter or {})
        if adapter is not None and run.stage in CONDITIONED:
            network = "prior" if "prior" in stage.trained else "decoder"
            settings = construct(LoRA, adapter, "objective.lora")
            with patch.object(nn.Module, "to", lambda module, *_, **__: module):  # fake tensors refuse, and are there already
                add_adapter(stage.trained, network, settings)
        if gpus:
            for network in stage.trained.children():
                attention.install(network, "sdpa")
        measured = measure(stage, run.batch_size, dtype, on_gpu=gpus > 0)
        with torch.no_grad():
            forward = measure(stage, 1, dtype, on_gpu=gpus > 0).flops
        checkpointed = None
        if _checkpoint(stage.trained):
            checkpointed = measure(stage, run.batch_size, dtype, on_gpu=gpus > 0)
        seen = 0
        if frozen is not None and not sections["data"].get("embeddings"):
            with torch.no_grad():
                asked = replace(frozen, loss=frozen.reading) if stage.reads_only else frozen
                seen = 0 if stage.looks_up else measure(asked, 1, dtype, on_gpu=gpus > 0).flops
        elif run.stage in CONDITIONED and frozen is None:
            unknown = True
            notes.append(f"the CLIP {sections['objective'].get('clip')!r} is not here: neither its weights nor its work count")
    counts = {name: _count(network) for name, network in stage.trained.named_children()}
    world = max(gpus, 1)
    frozen_count = _count(frozen.trained) if frozen is not None and not sections["data"].get("embeddings") else 0
    read, basis = _read_bytes(sections["data"], stage.side, stage.cached_bytes)
    return Plan(
        stage=run.stage,
        parameters=counts,
        trained=_count(stage.trained, learned=True),
        frozen_parameters=None if unknown else frozen_count,
        forward_flops=forward,
        training_flops=measured.flops // run.batch_size + seen,
        checkpointed_flops=checkpointed.flops // run.batch_size + seen if checkpointed else None,
        steps=run.max_steps,
        batch=run.batch_size,
        global_batch=run.batch_size * run.gradient_accumulation * world,
        precision=precision,
        gpus=gpus,
        memory=memory,
        strategies=list(_strategies(stage.trained, measured, checkpointed, frozen_count, gpus, bool(run.ema or run.ema_decay))),
        tflops=tflops or PEAK_TFLOPS[kind],
        utilisation=utilisation or UTILISATION[kind],
        read_bytes=read * run.max_steps * run.batch_size * run.gradient_accumulation * world,
        read_basis=basis,
        notes=notes,
    )


# ---------------------------------------------------------------------------------------------- counting


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors alive that were made inside it: now, and at most; with gradients set apart."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.most_with_gradients = self.gradients = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        self.most_with_gradients = max(self.most_with_gradients, self.now + self.gradients)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size

    def accumulated(self, parameter: Tensor) -> None:
        """A gradient is complete: from here on it counts as one, not as an activation."""
        self.gradients += parameter.grad.numel() * parameter.grad.element_size()
        parameter.grad = None


@dataclass
class Stage:
    """The networks of a stage and the loss of a batch of any size, over fake tensors."""

    trained: nn.ModuleDict
    loss: Callable[[int], Tensor]
    side: int = 0  # of the pictures that a sample reads
    cached_bytes: int = 0  # of a sample in an embedding cache, fp16
    reading: Callable[[int], Tensor] | None = None  # of a CLIP: the work of its text tower alone
    reads_only: bool = False  # whether a frozen CLIP is asked for captions alone
    looks_up: bool = False  # whether its answers are made once, before training


def measure(stage: Stage, batch: int, dtype: torch.dtype | None, on_gpu: bool = False) -> Measured:
    """A forward pass of `stage` on `batch` samples, and a backward pass where gradients are on, under autocast to `dtype`.

    Autocast on CUDA computes norms in fp32 and so keeps their inputs at twice the size; on a CPU it does not. `on_gpu`
    does as CUDA does.
    """
    live = LiveBytes()
    learned = [p for p in stage.trained.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(live.accumulated) for p in learned]
    if on_gpu and dtype:
        norms = [m for m in stage.trained.modules() if isinstance(m, NORMS)]
        hooks += [m.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:])) for m in norms]
    try:
        with live, flop_counter() as flops:
            with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                loss = stage.loss(batch)
            if torch.is_grad_enabled():
                loss.backward()
            del loss
    finally:
        for hook in hooks:
            hook.remove()
    return Measured(flops.get_total_flops(), live.most, live.most_with_gradients)


def _checkpoint(trained: nn.ModuleDict) -> bool:
    """Turn on the recomputing of activations in the networks that can; -> whether any can."""
    able = [networks.recompute_activations(network) for network in trained.children()]
    trained.train()
    return any(able)


def _count(module: nn.Module, learned: bool = False) -> int:
    """Parameters; `learned` ones alone where it is set."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learned)


def _strategies(
    trained: nn.ModuleDict,
    plain: Measured,
    checkpointed: Measured | None,
    frozen: int,
    gpus: int,
    ema: bool,
) -> Iterator[Strategy]:
    parameters = _count(trained)
    learned = _count(trained, learned=True)
    passes = [("", plain)] + ([(", activation checkpointing", checkpointed)] if checkpointed else [])
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
    largest = max((_count(block) for m in lists for block in m.children()), default=parameters)
    for suffix, found in passes:
        yield Strategy(
            "FSDP" + suffix,
            weights=parameters * FP32 // gpus + 2 * largest * FP32,  # the block at work and the next one are whole
            ema=learned * FP32 * ema // gpus,
            optimiser=2 * learned * FP32 // gpus,
            gradients=learned * FP32 // gpus + largest * FP32,
            activations=found.activations,
            frozen=frozen * FP32,
        )


# ---------------------------------------------------------------------------------------------- the stages


def _stage(name: str, sections: dict[str, dict], clip: "Stage | None") -> Stage:
    stages = {
        "clip": _clip_stage,
        "prior": _prior_stage,
        "prior_autoregressive": _autoregressive_stage,
        "text_proj": _text_proj_stage,
        "draft": _draft_stage,
        "decoder": _decoder_stage,
        "decoder_distill": _distill_stage,
        "upsampler_256": _upsampler_stage,
        "upsampler_1024": _upsampler_stage,
        "judge": _judge_stage,
    }
    if name not in stages:
        raise ConfigError(f"unknown stage {name!r}{nearest(name, stages)}; choose from {', '.join(stages)}")
    return stages[name](sections, clip)


def _clip_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    of_text, of_image = networks.towers(sections["model"])
    text, image = networks.text_tower(of_text), networks.image_tower(of_image)
    networks.freeze_below(text, sections["objective"].get("text_layers", 2))
    return _towers(text, image)


def _towers(text: nn.Module, image: nn.Module) -> Stage:
    tokens, side = networks.context_length(text), image.config.image_size

    def reading(batch: int) -> Tensor:
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        return text(ids, attention_mask=torch.ones_like(ids)).text_embeds

    def loss(batch: int) -> Tensor:
        of_image = image(torch.zeros(batch, 3, side, side)).image_embeds
        return (of_image @ reading(batch).T).float().logsumexp(1).mean()

    return Stage(nn.ModuleDict({"text_encoder": text, "image_encoder": image}), loss, side, reading=reading)


def _judge_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    """Each picture meets its own caption, the wrong ones beside it and, in training, names drawn at every step."""
    data, (told, of_image) = sections["data"], networks.towers(sections["model"])
    path = icons_path(data)
    with unset_fake_temporarily():  # the words are the data's
        words = word_tokenizer(vocabulary(IconSet.load(path)), told.get("context_length", 24))
    image = construct(JudgeImageTower, of_image, "model.image")
    text = construct(JudgeTextTower, told, "model.text", vocab_size=len(words))
    captions, names = 1 + data.get("wrong", 3), sections["objective"].get("names", 320)
    tokens, side = text.config.context_length, image.config.image_size

    def loss(batch: int) -> Tensor:
        texts = batch * captions + names * torch.is_grad_enabled()
        of_text = text(torch.zeros(texts, tokens, dtype=torch.long)).text_embeds
        of_image = image(torch.zeros(batch, 3, side, side)).image_embeds
        return (of_image @ of_text.T).float().logsumexp(1).mean()

    return Stage(nn.ModuleDict({"text_encoder": text, "image_encoder": image}), loss, side)


def _text(batch: int, dim: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(batch, dim), torch.zeros(batch, tokens, width), torch.ones(batch, tokens, dtype=torch.bool)


def _side(sections: dict[str, dict]) -> int:
    """Of the pictures that are read, in pixels."""
    return sections["data"].get("size", 64)


def _prior_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    network = networks.prior(sections["model"])
    dim, tokens = network.config.embedding_dim, network.config.num_embeddings
    width = network.encoder_hidden_states_proj.in_features

    def loss(batch: int) -> Tensor:
        text, encodings, mask = _text(batch, dim, tokens, width)
        when = torch.zeros(batch, dtype=torch.long)
        predicted = network(torch.zeros(batch, dim), when, text, encodings, mask).predicted_image_embedding
        return predicted.float().square().mean()

    return Stage(nn.ModuleDict({"prior": network}), loss, _side(sections), 2 * (2 * dim + tokens * width))


def _autoregressive_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    network = networks.prior_autoregressive(sections["model"])
    dim, tokens, count = (network.config[k] for k in ("embedding_dim", "num_embeddings", "components"))

    def loss(batch: int) -> Tensor:
        text, encodings, mask = _text(batch, dim, tokens, dim)
        drawn = torch.zeros(batch, count, dtype=torch.long)
        logits = network(drawn[:, :-1], drawn[:, 0], text, encodings, mask)
        return F.cross_entropy(logits.float().flatten(0, 1), drawn.flatten())

    return Stage(nn.ModuleDict({"prior": network}), loss, _side(sections), 2 * (2 * dim + tokens * dim))


def _decoder(sections: dict[str, dict], clip: Stage | None) -> tuple[nn.ModuleDict, int, int]:
    """A decoder with its text projection; the width and the number of the CLIP's token encodings."""
    text = None if clip is None else clip.trained["text_encoder"]
    trained = networks.decoder(sections["model"], None if text is None else networks.embedding_dim(text))
    return trained, trained["text_proj"].config.clip_embeddings_dim, 77 if text is None else networks.context_length(text)


def _text_proj_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    trained, dim, tokens = _decoder(sections, clip)
    project = trained["text_proj"]
    places = nn.Linear(project.config.cross_attention_dim, 2)

    def loss(batch: int) -> Tensor:
        _, encodings, mask = _text(batch, dim, tokens, dim)
        text = project.read(encodings, mask)
        return places(text).float().mean() + project.guess(encodings, text).float().mean()

    return Stage(nn.ModuleDict({"text_proj": project, "places": places}), loss, 64, reads_only=True)


def _draft_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    trained, dim, _ = _decoder(sections, clip)
    project = trained["text_proj"]
    if project.draft_head is None:
        raise ConfigError("the stage draft needs model.text_proj.draft")
    project.requires_grad_(False)
    project.draft_head.requires_grad_(True)

    def loss(batch: int) -> Tensor:
        return project.draft_head(torch.zeros(batch, dim)).float().square().mean()

    return Stage(nn.ModuleDict({"text_proj": project}), loss, 64, looks_up=True)


def _decoder_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    trained, dim, tokens = _decoder(sections, clip)
    network, project = trained["decoder"], trained["text_proj"]
    if getattr(project, "draft_head", None) is not None:
        project.draft_head.requires_grad_(False)
    side = sections["objective"].get("resolution") or network.config.sample_size

    def loss(batch: int) -> Tensor:
        text, encodings, mask = _text(batch, dim, tokens, dim)
        context, added = project(
            image_embeddings=torch.zeros(batch, dim), prompt_embeds=text, text_encoder_hidden_states=encodings, text_mask=mask
        )
        mask = expand_to_context(project, mask, True)
        when = torch.zeros(batch, dtype=torch.long)
        pictures = torch.zeros(batch, network.config.in_channels, side, side)
        predicted = network(pictures, when, context, class_labels=added, attention_mask=mask).sample
        return predicted.float().square().mean()

    return Stage(trained, loss, _side(sections), 2 * (2 * dim + tokens * dim))


def _distill_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    """A decoder under an adapter: the frozen one draws in many guided steps, and the adapted one answers for each part."""
    stage = _decoder_stage(sections, clip)
    decoder, told = stage.trained["decoder"], sections["objective"]
    steps, parts = told.get("teacher_steps", 8), told.get("evaluations", 4)
    halves = 1 if told.get("guidance", 3.0) == 1 else 2

    def loss(batch: int) -> Tensor:
        with torch.no_grad():
            decoder.disable_adapters()
            for _ in range(steps):
                stage.loss(halves * batch)
            decoder.enable_adapters()
        return stage.loss(parts * batch)

    return replace(stage, loss=loss)


def _upsampler_stage(sections: dict[str, dict], clip: Stage | None) -> Stage:
    network = networks.upsampler(sections["model"])
    size = network.config.sample_size
    side = round(sections["data"].get("crop", 0.25) * size)

    def loss(batch: int) -> Tensor:
        told = {"class_labels": torch.zeros(batch)} if networks.is_noise_conditioned(network) else {}
        predicted = network(torch.zeros(batch, 6, side, side), torch.zeros(batch, dtype=torch.long), **told).sample
        return predicted.float().square().mean()

    return Stage(nn.ModuleDict({"upsampler": network}), loss, size)


def _clip(sections: dict[str, dict], config_path: str | Path) -> Stage | None:
    """The CLIP that a stage is trained against: from its folder, or from the configuration beside this one that makes it."""
    name = sections["objective"].get("clip")
    if not name:
        raise ConfigError("missing key objective.clip")
    for path in sorted(shipped(config_path).parent.glob("*.yaml")):
        config = load_config(path)
        if config.get("stage") == "clip" and config.get("output_dir") == str(name):
            model = config.get("model") or {}
            return _towers(networks.text_tower(model.get("text")), networks.image_tower(model.get("image")))
    if "/" in str(name) and not Path(str(name)).is_dir():
        return None
    folder = resolve(components_folder(name))
    index = check_folder(folder)
    return _towers(*(_empty(folder / part, *index[part]) for part in ("text_encoder", "image_encoder")))


def _empty(folder: Path, library: str, class_name: str) -> nn.Module:
    """A component of the shape that its folder states, without its weights."""
    component = getattr(importlib.import_module(library), class_name)
    if hasattr(component, "config_class") and component.config_class is not None:
        return component(component.config_class.from_pretrained(folder))
    return component.from_config(component.load_config(folder))


# ---------------------------------------------------------------------------------------------- data


def _read_bytes(data: dict[str, Any], side: int, cached: int) -> tuple[int, str]:
    """Bytes that one sample reads, and how that is known."""
    if data.get("embeddings"):
        return cached, "an embedding cache in fp16, every token counted"
    path = Path(str(data.get("path", "")))
    sizes = [p.stat().st_size for _, p in zip(range(200), _pictures(path), strict=False)]
    if sizes:
        return sum(sizes) // len(sizes), f"the mean file of {path}"
    return round(side * side * JPEG_BYTES), f"JPEG of {side} px a side at {JPEG_BYTES} bytes a pixel, assumed"


def _pictures(path: Path) -> Iterator[Path]:
    return (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else iter(())
