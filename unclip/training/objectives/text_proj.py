"""Teaching a decoder's text layers from captions, ahead of the decoder: what captions name looks like, and where it is."""

# B batch, N text tokens, P places to a picture's side, K context width

from typing import Any

import torch
from torch import Tensor, nn

from ... import networks
from ...data.examples import EmojiScenes, captioned_examples
from ...diffusion.schedules import masked_mean
from ...runtime.config import ConfigError
from .base import Objective, to_device
from .conditioned import gained, numbers
from .frozen_clip import frozen_clip, name_tokens
from .grounding import IconEmbeddings, mean_over, of_two, unlike

LEARNED = ("encoder_hidden_states_proj.", "text_blocks.", "text_encoder_hidden_states_norm.", "text_to_image.")


class TextProjObjective(Objective):
    """A decoder's `text_proj` without the decoder, at a seventh of the cost of grounding one at 32 px (`objective.grounding`).

    "what" is 1 - cosine between the image embedding that a name's tokens are guessed to mean (`text_images`) and CLIP's of the
    thing alone. "where" is read off the same tokens by a linear layer that is not kept: how far, in sides of the picture, it
    is off the centre of what the thing covers alone, each way. `where` weighs it. `model` is the decoder's, with `text_layers`
    and `text_images`.
    """

    optional_init = ("places",)
    shardable = False

    def __init__(self, model: dict, data: dict, seed: int, clip: str, where: float = 2.0):
        super().__init__()
        if where < 0:
            raise ConfigError(f"objective.where must be at least 0, got {where}")
        self.examples, self.validation = captioned_examples(data, seed=seed), captioned_examples(data, "validation")
        if not isinstance(self.examples, EmojiScenes):
            raise ConfigError(f"the stage text_proj needs emoji scenes, which know what is where; data.path is {data['path']}")
        self.frozen, self.where = frozen_clip(clip, None), where
        project = networks.decoder(model, self.frozen.dim, self.frozen.fingerprint)["text_proj"]
        if not (project.text_blocks and project.config.text_images):
            raise ConfigError("the stage text_proj needs model.text_proj with text_layers above 0 and text_images: true")
        for name, parameter in project.named_parameters():
            parameter.requires_grad_(name.startswith(LEARNED))
        self.trained = nn.ModuleDict({"text_proj": project, "places": nn.Linear(project.config.cross_attention_dim, 2)})
        self.icon_embeds = IconEmbeddings(self.examples.icons, self.frozen)

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | gained(self.trained[name], state)

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        tokens = self.frozen.tokenize(batch["caption"], self.fixes_lengths, offsets=True)
        tokens = to_device(tokens, batch["rows"].device)
        names, embeds = name_tokens(tokens["offsets"], batch["spans"]), self.icon_embeds(batch["rows"])
        return tokens | {"names": names, "icon_embeds": embeds, "sides": batch["sides"]}

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        misses = self._misses(batch)
        what, where = (values.sum() for values, _ in misses.values())
        loss = (what + self.where * where) / len(batch["sides"])
        return loss, {name: masked_mean(values.detach(), counted) for name, (values, counted) in misses.items()}

    def _misses(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """ "what" of all names in a batch, and "where" of those of two that are not wholly behind another.

        Each is [B, 2], of the first name and of the second, 0 where it does not count, and comes with where it counts.
        """
        project, sides, names = self.trained["text_proj"], batch["sides"], batch["names"]
        _, encodings, mask = self.frozen.encode(batch["tokens"], batch["mask"])
        text = project.read(encodings, mask)
        found, told = self.trained["places"](text).float(), of_two(names, sides)  # [B, N, 2], [B]
        where, counted = [], []
        for sign in (1, -1):
            covered = sides == sign
            off = (found - centres(covered)[:, None]).abs().mean(-1)
            counted.append(told & covered.flatten(1).any(1))
            where.append(torch.where(counted[-1], mean_over(names == sign, off)[0], 0))
        what = unlike(project.guess(encodings, text), names, batch["icon_embeds"])
        return {"what": what, "where": (torch.stack(where, 1), torch.stack(counted, 1))}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Both of held-out captions, whose combinations were never seen and whose names partly were not."""
        misses = self._misses(self._held_out(512))
        return numbers({name: masked_mean(values, counted) for name, (values, counted) in misses.items()})

    def components(self) -> dict[str, Any]:
        return {"text_proj": self.trained["text_proj"]}


def centres(covered: Tensor) -> Tensor:
    """Where the middle of what is `covered` [B, P, P] bool is, across and down in [0, 1]: [B, 2]; 0 of nothing."""
    at = (torch.arange(covered.shape[-1], device=covered.device) + 0.5) / covered.shape[-1]
    area = covered.sum((1, 2)).clamp_min(1)
    return torch.stack([(covered.sum(1) * at).sum(1) / area, (covered.sum(2) * at).sum(1) / area], 1)
