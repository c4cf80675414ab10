"""What prior and decoder begin alike with: diffusion on captioned pictures, conditioned on a frozen CLIP."""

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..data.examples import captioned_examples, seeded_noise
from ..diffusion import levels, logit_normal_timesteps, schedule
from .base import Objective
from .frozen_clip import FrozenCLIP


class ClipConditioned(Objective):
    """Examples, a frozen CLIP, a schedule of noise, and the means over a batch of what a stage's `_losses` answers."""

    held_out = 128  # examples that validation looks at

    def __init__(self, data: dict, seed: int, clip: str, prediction_type: str, timesteps: tuple[float, float]):
        super().__init__()
        self.examples = captioned_examples(data, seed=seed)
        self.validation = captioned_examples(data, "validation")
        self.frozen = FrozenCLIP.load(clip)
        self.seed, self.timesteps = seed, timesteps
        self.schedule = schedule(prediction_type)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, timesteps = self._losses(batch)
        return losses.mean(), levels(losses.detach(), timesteps, self.schedule.config.num_train_timesteps)

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per-example losses [B] and their timesteps [B]."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out examples with fixed noise, in all and per quarter of the schedule."""
        batch = self._held_out(self.held_out)
        parts = [self._losses({k: v[i : i + 32] for k, v in batch.items()}) for i in range(0, self.held_out, 32)]
        losses, timesteps = (torch.cat(p) for p in zip(*parts, strict=True))
        found = levels(losses, timesteps, self.schedule.config.num_train_timesteps)
        return {"loss": losses.mean().item()} | {k: v.item() for k, v in found.items()}

    def _held_out(self, count: int) -> dict:
        return default_collate([self.validation[i] for i in range(count)])

    def _noised(self, clean: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`clean` [B, ...] at each example's own noise level; the noise; the timesteps [B]."""
        noise = seeded_noise(self.seed, batch["index"], tuple(clean.shape[1:])).to(clean)
        timesteps = logit_normal_timesteps(batch["random"][:, 2], self.schedule.config.num_train_timesteps, *self.timesteps)
        return self.schedule.add_noise(clean, noise, timesteps), noise, timesteps

    def _text(self, captions: list[str], dropped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [B, D], encodings [B, N, D] and mask [B, N]; of "" where `dropped` [B]."""
        return self.frozen.text(["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)])


def in_range(images: Tensor) -> Tensor:
    """uint8 pictures as fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1
