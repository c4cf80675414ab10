"""Training the layout predictor: from captions to the objects of their scenes and their places."""

# B batch, K slots, N text tokens, D embedding dimension

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ... import networks
from ...data.examples import EmojiScenes, captioned_examples
from ...data.layouts import MAX_LAYERS
from ...diffusion.schedules import masked_mean
from ...runtime.config import ConfigError
from .base import Objective, mean_where, to_device
from .conditioned import check_shares, new_weights, to_floats
from .frozen_clip import frozen_clip, replace_dropped
from .icon_bank import load_icon_bank
from .random_columns import COLUMNS, DROP_TEXT

BOX_WEIGHT = 10.0  # of the distance of boxes, in fractions of the image's side


class LayoutObjective(Objective):
    """The layout of scenes from their captions, with the text layers and the predicted image embeddings as they are.

    The loss adds up: cross-entropies of a single object alone and of each slot's use; the distance of the boxes of used slots
    (L1), weighted by BOX_WEIGHT; the mean squared error of the background; and 1 - cosine between the embedding of a used
    slot and CLIP's of its icon, unless that is recoloured. In `drop_text` of the examples the caption is empty and the image
    that of a single object.
    """

    optional_init = ("text_proj",)
    load_icon_bank = load_icon_bank
    shardable = False

    def __init__(self, model: dict, data: dict, seed: int, clip: str, drop_text: float = 0.05):
        super().__init__()
        check_shares(drop_text=drop_text)
        self.examples, self.validation = self.load_examples(data, "train", seed), self.load_examples(data, "validation")
        if not isinstance(self.examples, EmojiScenes):
            raise ConfigError(f"the stage layout needs emoji scenes, which know what is where; data.path is {data['path']}")
        self.frozen, self.drop_text = self.load_clip(clip, None), drop_text
        project: Any = networks.decoder(model, self.frozen.dim, self.frozen.fingerprint)["text_proj"]
        if project.layout_predictor is None or project.layout_predictor.slots < MAX_LAYERS:
            raise ConfigError(f"the stage layout needs model.text_proj.layout with at least {MAX_LAYERS} slots")
        project.requires_grad_(False)
        project.layout_predictor.requires_grad_(True)
        self.trained = nn.ModuleDict({"text_proj": project})
        self.seed = seed
        self.icon_bank = self.load_icon_bank(data, None, 0)

    @property
    def text_proj(self) -> Any:
        """The network whose layout predictor is trained."""
        return self.trained["text_proj"]

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> Dataset[Any]:
        return captioned_examples(data, split, seed)

    def load_clip(self, clip: str, embeddings: str | None) -> Any:
        return frozen_clip(clip, None)

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | new_weights(self.trained[name], state)

    @torch.no_grad()
    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        device = batch["boxes"].device
        tokens = to_device(self.frozen.tokenize(batch["caption"], self.fixes_lengths), device)
        dropped = batch["random"][:, DROP_TEXT] < self.drop_text
        given = replace_dropped((tokens["tokens"], tokens["mask"]), self.frozen.empty(), dropped)
        batch["layer_embeds"] = self.icon_bank.embeds().to(device)[batch["layers"].clamp_min(0)]
        names = ("boxes", "layers", "recoloured", "background", "icon", "random", "layer_embeds")
        return dict(zip(("tokens", "mask"), given, strict=True)) | {name: batch[name] for name in names}

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = self.losses(batch)
        return torch.stack(list(losses.values())).sum(), {k: v.detach() for k, v in (losses | metrics).items()}

    def losses(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the loss, and what else is measured: shares of images whose kind and number of objects are right."""
        with torch.no_grad():
            _, encodings, mask = self.frozen.encode(batch["tokens"], batch["mask"])
        layout, guess = self.text_proj.predict_layout(encodings, mask)
        has_text = batch["random"][:, DROP_TEXT] >= self.drop_text
        is_single = (batch["icon"] >= 0) | ~has_text
        present = (batch["layers"] >= 0) & has_text[:, None]  # [B, K]
        slots = layout.boxes[:, :MAX_LAYERS]
        used = F.pad(present, (0, layout.present.shape[1] - MAX_LAYERS))
        slot_losses = F.binary_cross_entropy_with_logits(layout.present, used.float(), reduction="none").mean(1)
        distances = (slots - batch["boxes"]).abs().mean(-1)
        cosines = F.cosine_similarity(layout.embeddings(guess)[:, :MAX_LAYERS], batch["layer_embeds"], dim=-1)
        background = (layout.background - batch["background"]).square().mean(1)
        losses = {
            "single": F.binary_cross_entropy_with_logits(layout.is_single, is_single.float()),
            "present": mean_where(slot_losses, has_text),
            "boxes": BOX_WEIGHT * mean_where(distances, present),
            "background": mean_where(background, has_text),
            "what": mean_where(1 - cosines, present & ~batch["recoloured"]),
        }
        right = ((layout.present > 0) == used).all(1)
        metrics = {
            "single_right": ((layout.is_single > 0) == is_single).float().mean(),
            "number_right": masked_mean(right.float(), has_text),
        }
        return losses, metrics

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        tokens = self.frozen.empty_tokens.shape[1]
        rows = torch.full((size, MAX_LAYERS), -1)
        return {
            "tokens": torch.zeros(size, tokens, dtype=torch.long),
            "mask": torch.ones(size, tokens, dtype=torch.bool),
            "boxes": torch.zeros(size, MAX_LAYERS, 3),
            "layers": rows,
            "recoloured": rows > 0,
            "background": torch.zeros(size, 3),
            "icon": rows[:, 0],
            "random": torch.full((size, COLUMNS), 0.5),
            "layer_embeds": torch.zeros(size, MAX_LAYERS, self.frozen.dim),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The same of held-out captions, whose combinations were never seen."""
        losses, metrics = self.losses(self.held_out_batch(512))
        return to_floats(losses | metrics)

    def components(self) -> dict[str, Any]:
        return {"text_proj": self.trained["text_proj"]}
