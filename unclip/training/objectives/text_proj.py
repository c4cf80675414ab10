"""Training a decoder's text layers from captions, ahead of the decoder: what named things look like, and where they are."""

# B batch, N text tokens, P places to an image's side, K context width

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ... import networks
from ...data.examples import EmojiScenes, captioned_examples
from ...data.layouts import PLACES
from ...diffusion.schedules import masked_mean
from ...runtime.config import ConfigError
from .base import Objective, to_device
from .conditioned import new_weights, to_floats
from .frozen_clip import frozen_clip, name_tokens
from .grounding import IconEmbeddings, mean_over_tokens, name_distances, names_two

LEARNED = ("encoder_hidden_states_proj.", "text_blocks.", "text_encoder_hidden_states_norm.", "text_to_image.")


class TextProjObjective(Objective):
    """A decoder's `text_proj` without the decoder, at a seventh of the cost of grounding one at 32 px (`objective.grounding`).

    "what" is 1 - cosine between the image embedding that is predicted for a name's tokens (`text_images`) and CLIP's of the
    thing alone. "where" is predicted from the same tokens by a linear layer that is not saved: its distance, in sides of the
    image, to the centre of what the thing covers alone, along each axis. `where` weighs it. `model` is the decoder's, with
    `text_layers` and `text_images`.
    """

    optional_init = ("places",)
    shardable = False

    def __init__(self, model: dict, data: dict, seed: int, clip: str, where: float = 2.0):
        super().__init__()
        if where < 0:
            raise ConfigError(f"objective.where must be at least 0, got {where}")
        self.examples, self.validation = self.load_examples(data, "train", seed), self.load_examples(data, "validation")
        if not isinstance(self.examples, EmojiScenes):
            raise ConfigError(f"the stage text_proj needs emoji scenes, which know what is where; data.path is {data['path']}")
        self.frozen, self.where = self.load_clip(clip, None), where
        project: Any = networks.decoder(model, self.frozen.dim, self.frozen.fingerprint)["text_proj"]
        if not (project.text_blocks and project.config.text_images):
            raise ConfigError("the stage text_proj needs model.text_proj with text_layers above 0 and text_images: true")
        for name, parameter in project.named_parameters():
            parameter.requires_grad_(name.startswith(LEARNED))
        self.trained = nn.ModuleDict({"text_proj": project, "places": nn.Linear(project.config.cross_attention_dim, 2)})
        self.icon_embeds = IconEmbeddings(self.examples.icons, self.frozen)

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> Dataset[Any]:
        return captioned_examples(data, split, seed)

    def load_clip(self, clip: str, embeddings: str | None) -> Any:
        return frozen_clip(clip, None)

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | new_weights(self.trained[name], state)

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        tokens = self.frozen.tokenize(batch["caption"], self.fixes_lengths, offsets=True)
        tokens = to_device(tokens, batch["rows"].device)
        names, embeds = name_tokens(tokens["offsets"], batch["spans"]), self.icon_embeds(batch["rows"])
        return tokens | {"names": names, "icon_embeds": embeds, "sides": batch["sides"]}

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        errors = self.errors(batch)
        what, where = (values.sum() for values, _ in errors.values())
        loss = (what + self.where * where) / len(batch["sides"])
        return loss, {name: masked_mean(values.detach(), counted) for name, (values, counted) in errors.items()}

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        tokens = self.frozen.empty_tokens.shape[1]
        return {
            "tokens": torch.zeros(size, tokens, dtype=torch.long),
            "mask": torch.ones(size, tokens, dtype=torch.bool),
            "names": torch.zeros(size, tokens, dtype=torch.int8),
            "icon_embeds": torch.zeros(size, 2, self.frozen.dim),
            "sides": torch.zeros(size, PLACES, PLACES, dtype=torch.int8),
        }

    def errors(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """ "what" of all names in a batch, and "where" of those of two that are not wholly behind another.

        Each is [B, 2], of the first name and of the second, 0 where it does not count, and comes with where it counts.
        """
        project: Any = self.trained["text_proj"]
        sides, names = batch["sides"], batch["names"]
        _, encodings, mask = self.frozen.encode(batch["tokens"], batch["mask"])
        text = project.read(encodings, mask)
        places, is_counted = self.trained["places"](text).float(), names_two(names, sides)  # [B, N, 2], [B]
        where, counted = [], []
        for sign in (1, -1):
            covered = sides == sign
            distances = (places - centres(covered)[:, None]).abs().mean(-1)
            counted.append(is_counted & covered.flatten(1).any(1))
            where.append(torch.where(counted[-1], mean_over_tokens(names == sign, distances)[0], 0))
        what = name_distances(project.guess(encodings, text), names, batch["icon_embeds"])
        return {"what": what, "where": (torch.stack(where, 1), torch.stack(counted, 1))}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Both of held-out captions, whose combinations were never seen and whose names partly were not."""
        errors = self.errors(self.held_out_batch(512))
        return to_floats({name: masked_mean(values, counted) for name, (values, counted) in errors.items()})

    def components(self) -> dict[str, Any]:
        return {"text_proj": self.trained["text_proj"]}


def centres(covered: Tensor) -> Tensor:
    """Where the middle of what is `covered` [B, P, P] bool is, across and down in [0, 1]: [B, 2]; 0 of nothing."""
    at = (torch.arange(covered.shape[-1], device=covered.device) + 0.5) / covered.shape[-1]
    area = covered.sum((1, 2)).clamp_min(1)
    return torch.stack([(covered.sum(1) * at).sum(1) / area, (covered.sum(2) * at).sum(1) / area], 1)
