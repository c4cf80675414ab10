"""The shared base of prior and decoder: diffusion on captioned images, conditioned on a frozen CLIP."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ...data.examples import captioned_examples, seeded_noise
from ...diffusion.schedules import levels, logit_normal_timesteps, move_schedule, schedule, snr_weight, uniform_timesteps
from ...io.pixels import normalize
from ...pipelines.lora import save_adapter
from ...runtime.config import ConfigError, construct
from .base import Objective, to_device
from .frozen_clip import CachedCLIP, FrozenCLIP, frozen_clip, replace_dropped, unpadded_length
from .random_columns import COLUMNS, IMAGE_NOISE, TIMESTEP

# The layers that an adapter changes where its settings name none: attention, in this package's networks and in diffusers'.
TARGETS = ["qkv", "context_kv", "out", "to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
# Layers that a network may have and the weights that it starts from lack.
NEW_LAYERS = re.compile(
    r"^(text_blocks|text_to_image|text_image_places|style_embedding|draft_head|layout_predictor|draft_in|draft_out|position_embeddings)\.|\.position\.weight$"
)


@dataclass
class NoiseLevels:
    """The distribution of timesteps: "logit_normal" with `mean` and `std` of its logit, or "uniform" as in the paper."""

    kind: str = "logit_normal"
    mean: float = 0.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.kind not in ("logit_normal", "uniform"):
            raise ValueError(f"timesteps must be logit_normal or uniform, got {self.kind!r}")

    def sample(self, random: Tensor, count: int) -> Tensor:
        """Timesteps [B] in [0, `count`) from `random` [B], uniform in [0, 1)."""
        if self.kind == "uniform":
            return uniform_timesteps(random, count)
        return logit_normal_timesteps(random, count, self.mean, self.std)


@dataclass
class LoRA:
    """A low-rank adapter, W + alpha/rank B A (arXiv 2106.09685, section 4.1), on the layers that `targets` names."""

    rank: int = 8
    alpha: float | None = None  # None is the rank: a factor of 1
    dropout: float = 0.0
    targets: list[str] | None = None  # endings of the layers' names

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to less than 1, got {self.dropout}")


def add_adapter(trained: nn.ModuleDict, name: str, lora: LoRA) -> None:
    """Put an adapter on `trained[name]` and freeze everything else. Raises ConfigError where no layer has a target's name."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("objective.lora needs PEFT; install it with: pip install 'unclip[train]'") from None
    trained.requires_grad_(False)
    network: Any = trained[name]
    wanted = lora.targets or TARGETS
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    targets = [n for n in layers if any(n == t or n.endswith(f".{t}") for t in wanted)]
    if not targets:
        raise ConfigError(f"objective.lora.targets: no layer's name ends in {', '.join(wanted)}")
    alpha: Any = lora.rank if lora.alpha is None else lora.alpha  # PEFT takes fractions too
    network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets))


def check_shares(**shares: float) -> None:
    """Raises ConfigError, naming it, for a share that is not from 0 to 1."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"objective.{name} must be from 0 to 1, got {value}")


def check_counts(**counts: int) -> None:
    """Raises ConfigError, naming it, for fewer examples than a standard deviation needs."""
    for name, value in counts.items():
        if value < 2:
            raise ConfigError(f"objective.{name} must be at least 2, got {value}")


class ClipConditioned(Objective):
    """Examples, a frozen CLIP, noise, an adapter, and the means over a batch of a stage's `example_losses`.

    `min_snr` is gamma of the Min-SNR weighting (arXiv 2303.09556); None weighs every timestep alike. With `lora` the
    stage's `network` keeps its weights and an adapter on it is trained.
    """

    network: str  # the diffusion network's name in `trained`
    held_out: int = 128  # examples that validation uses
    reads_images: bool = True  # also where an embedding cache holds their embeddings
    frozen: Any  # FrozenCLIP or CachedCLIP
    schedule: Any  # a scheduler of diffusers

    def __init__(
        self,
        data: dict,
        seed: int,
        clip: str,
        prediction_type: str,
        timesteps: NoiseLevels,
        min_snr: float | None,
        lora: dict | None,
    ):
        super().__init__()
        self.schedule = schedule(prediction_type)
        if min_snr is not None and not min_snr > 0:
            raise ValueError(f"min_snr must be above 0, got {min_snr}")
        self.lora = construct(LoRA, lora, "objective.lora") if lora is not None else None
        self.examples = self.load_examples(data, "train", seed)
        self.validation = self.load_examples(data, "validation")
        self.frozen = self.load_clip(clip, data.get("embeddings"))
        self.seed, self.timesteps, self.min_snr = seed, timesteps, min_snr

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> Dataset[Any]:
        return captioned_examples(data, split, seed, pixels=self.reads_images)

    def load_clip(self, clip: str, embeddings: str | None) -> FrozenCLIP | CachedCLIP:
        return frozen_clip(clip, embeddings)

    def first_batches(
        self, count: int, device: torch.device | str, progress: Callable[[Iterable], Iterable]
    ) -> Iterator[dict[str, Tensor]]:
        """The first `count` training examples in batches, on `device`, where the frozen CLIP is moved too."""
        self.frozen.to(device)
        for start in progress(range(0, count, 128)):
            batch = default_collate([self.examples[i] for i in range(start, min(start + 128, count))])
            yield self.to_tensors(to_device(batch, torch.device(device)))

    def add_adapter(self) -> None:
        if self.lora is not None:
            add_adapter(self.trained, self.network, self.lora)

    def write(self, folder: Path) -> None:
        """Write the present weights for a pipeline: its components, or the adapter as `load_lora_weights` takes it."""
        if self.lora is None:
            super().write(folder)
        else:
            save_adapter(folder, {self.network: self.trained[self.network]})

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        device = batch["random"].device
        move_schedule(self.schedule, device)
        if "text_embeds" in batch:
            length = batch["mask"].shape[1] if self.fixes_lengths else unpadded_length(batch["mask"])
            batch = batch | {name: batch[name][:, :length] for name in ("encodings", "mask")}
        elif "caption" in batch:
            batch = batch | to_device(self.tokenize(batch), device)
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    def tokenize(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The tokens of a batch's captions, on the CPU."""
        return self.frozen.tokenize(batch["caption"], self.fixes_lengths)

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, timesteps = self.example_losses(batch)
        return losses.mean(), levels(losses.detach(), timesteps, self.schedule.config.num_train_timesteps)

    def example_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per-example losses [B] and their timesteps [B]."""
        raise NotImplementedError

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        dim = self.frozen.dim
        batch = {"index": torch.arange(size), "random": torch.full((size, COLUMNS), 0.5)}
        if isinstance(self.frozen, CachedCLIP):
            encodings = self.frozen.encodings[0]
            batch |= {"text_embeds": torch.zeros(size, dim), "encodings": torch.zeros(size, *encodings.shape)}
            batch |= {"mask": torch.ones(size, len(encodings), dtype=torch.bool), "image_embeds": torch.zeros(size, dim)}
        else:
            tokens = self.frozen.empty_tokens.shape[1]
            batch["tokens"] = torch.zeros(size, tokens, dtype=torch.long)
            batch["mask"] = torch.ones(size, tokens, dtype=torch.bool)
        if self.reads_images or not isinstance(self.frozen, CachedCLIP):
            side = self.examples.size
            batch["image"] = torch.zeros(size, 3, side, side, dtype=torch.uint8)
        return batch

    def squared_error(self, predicted: Tensor, wanted: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared errors [B], weighted as `min_snr` says."""
        losses = (predicted - wanted).square().flatten(1).mean(1)
        return losses if self.min_snr is None else losses * snr_weight(self.schedule, timesteps, self.min_snr)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out examples with fixed noise, in all and per quarter of the schedule."""
        batch = self.held_out_batch(self.held_out)
        parts = [self.example_losses({k: v[i : i + 32] for k, v in batch.items()}) for i in range(0, self.held_out, 32)]
        losses, timesteps = (torch.cat(p) for p in zip(*parts, strict=True))
        found = levels(losses, timesteps, self.schedule.config.num_train_timesteps)
        return {"loss": losses.mean().item()} | to_floats(found)

    def add_noise(self, clean: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`clean` [B, ...] at each example's own noise level; the noise; the timesteps [B]."""
        noise = seeded_noise(self.seed + IMAGE_NOISE, batch["index"], clean)
        timesteps = self.timesteps.sample(batch["random"][:, TIMESTEP], self.schedule.config.num_train_timesteps)
        return self.schedule.add_noise(clean, noise, timesteps), noise, timesteps

    def encode_text(self, batch: dict[str, Tensor], dropped: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [B, D], encodings [B, N, D] and mask [B, N]; of "" where `dropped` [B]. Cached ones if there are."""
        cached = "text_embeds" in batch
        given: Any = tuple(batch[name] for name in (("text_embeds", "encodings", "mask") if cached else ("tokens", "mask")))
        if dropped is not None:
            given = replace_dropped(given, self.frozen.empty(), dropped)
        return given if cached else self.frozen.encode(*given)

    def encode_empty_text(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`encode_text` of as many empty captions, padded to the batch's length."""
        return self.encode_text(batch, torch.ones_like(batch["random"][:, 0], dtype=torch.bool))

    def encode_image(self, batch: dict[str, Tensor]) -> Tensor:
        """Image embeddings [B, D], the cached ones if there are."""
        return batch["image_embeds"] if "image_embeds" in batch else self.frozen.image(normalize(batch["image"]))


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics as Python's numbers, without means of nothing (NaN)."""
    found = {name: value.item() for name, value in metrics.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def new_weights(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The initial weights of text layers, positions and `text_images` of `network` that `state` does not hold."""
    return {name: weight for name, weight in network.state_dict().items() if name not in state and NEW_LAYERS.search(name)}


def cosines(sampled: Tensor, true: Tensor, text: Tensor) -> dict[str, float]:
    """Mean cosines of sampled image embeddings [B, D] to the true ones and to the texts', and of the true to the texts'."""
    pairs = {"cosine": (sampled, true), "cosine_to_text": (sampled, text), "cosine_true_to_text": (true, text)}
    return {name: F.cosine_similarity(*pair).mean().item() for name, pair in pairs.items()}
