"""Teaching a decoder's text layers from captions, ahead of the decoder: what captions name looks like, and where it is."""

# B batch, N text tokens, P places to a picture's side, K context width

from typing import Any

import torch
from torch import Tensor, nn

from ... import networks
from ...data.examples import EmojiScenes, captioned_examples
from ...runtime.config import ConfigError
from .base import Objective
from .conditioned import gained, unpadded
from .frozen_clip import frozen_clip
from .grounding import IconEmbeddings, mean_over, of_two, unlike

LEARNED = ("encoder_hidden_states_proj.", "text_blocks.", "text_encoder_hidden_states_norm.", "text_to_image.")


class TextProjObjective(Objective):
    """A decoder's `text_proj` without the decoder, at a seventh of the cost of grounding one at 32 px (`objective.grounding`).

    "what" is 1 - cosine between the image embedding that a name's tokens are guessed to mean (`text_images`) and CLIP's of the
    thing alone. "where" is read off the same tokens by a linear layer that is not kept: how far, in sides of the picture, it
    is off the centre of what the thing covers alone, each way. `where` weighs it. `model` is the decoder's, with `text_layers`
    and `text_images`.
    """

    anew = ("places",)
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

    def starting(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | gained(self.trained[name], state)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        what, where = self._misses(batch)
        loss = (what.sum() + self.where * where.sum()) / len(batch["rows"])
        return loss, {k: v.detach().mean() for k, v in {"what": what, "where": where}.items() if len(v)}

    def _misses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """ "what" of all names in a batch, and "where" of those of two that are not wholly behind another."""
        project, sides = self.trained["text_proj"], batch["sides"]
        _, encodings, mask = self.frozen.text(batch["caption"])
        encodings, mask = unpadded(encodings, mask)
        names = self.frozen.tokens_of(batch["caption"], batch["spans"]).to(sides.device)[:, : encodings.shape[1]]
        text = project.read(encodings, mask)
        what = unlike(project.guess(encodings, text), names, self.icon_embeds(batch["rows"]))
        rows = of_two(names, sides)
        found, where = self.trained["places"](text[rows]).float(), []  # [rows, N, 2]
        for sign in (1, -1):
            covered = sides[rows] == sign
            off = (found - centres(covered)[:, None]).abs().mean(-1)
            where.append(mean_over(names[rows] == sign, off)[covered.flatten(1).any(1)])
        return what, torch.cat(where)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Both of held-out captions, whose combinations were never seen and whose names partly were not."""
        batch = self._held_out(512)
        return {k: v.mean().item() for k, v in zip(("what", "where"), self._misses(batch), strict=True)}

    def components(self) -> dict[str, Any]:
        return {"text_proj": self.trained["text_proj"]}


def centres(covered: Tensor) -> Tensor:
    """Where the middle of what is `covered` [B, P, P] bool is, across and down in [0, 1]: [B, 2]; 0 of nothing."""
    at = (torch.arange(covered.shape[-1], device=covered.device) + 0.5) / covered.shape[-1]
    area = covered.sum((1, 2)).clamp_min(1)
    return torch.stack([(covered.sum(1) * at).sum(1) / area, (covered.sum(2) * at).sum(1) / area], 1)
