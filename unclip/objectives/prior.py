"""Training the diffusion prior (paper, section 2.2): x0 mean squared error on whitened CLIP image embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from prior import DiffusionPrior

from .. import attention
from ..config import construct
from ..data.examples import captioned_examples, seeded_noise
from ..diffusion import ddim, levels, logit_normal_timesteps, schedule
from ..sampling import denoise
from .base import Objective
from .frozen_clip import FrozenCLIP

VALIDATION_EXAMPLES = 512


class PriorObjective(Objective):
    """Equation 2 of the paper, with the text (embedding and encodings together) dropped for a share of the examples."""

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        drop_text: float = 0.1,
        whitening_examples: int = 2048,
        timestep_mean: float = 0.6,
        timestep_std: float = 1.2,
    ):
        super().__init__()
        self.examples = captioned_examples(data, seed=seed)
        self.validation = captioned_examples(data, "validation")
        self.frozen = FrozenCLIP.load(clip)
        prior = construct(DiffusionPrior, model, "model")
        prior.register_to_config(clip_fingerprint=self.frozen.fingerprint)
        self.trained = nn.ModuleDict({"prior": attention.install(prior)})
        self.seed, self.drop_text, self.whitening_examples = seed, drop_text, whitening_examples
        self.timesteps = (timestep_mean, timestep_std)
        self.schedule = schedule("sample")

    @torch.no_grad()
    def prepare(self) -> None:
        """Mean and standard deviation of every embedding dimension, from the first training examples."""
        embeds = torch.cat(
            [
                self.frozen.image(torch.stack([self.examples[i]["image"] for i in range(n, n + 128)]).float() / 127.5 - 1)
                for n in range(0, self.whitening_examples, 128)
            ]
        )
        prior = self.trained["prior"]
        prior.clip_mean.copy_(embeds.mean(0, keepdim=True))
        prior.clip_std.copy_(embeds.std(0, keepdim=True).clamp_min(1e-4))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, timesteps = self._losses(batch)
        return losses.mean(), levels(losses.detach(), timesteps, self.schedule.config.num_train_timesteps)

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        prior, random = self.trained["prior"], batch["random"]
        clean = prior.whiten(self.frozen.image(batch["image"].float() / 127.5 - 1))
        dropped = (random[:, 0] < self.drop_text).tolist()
        text, encodings, mask = self.frozen.text(["" if d else c for c, d in zip(batch["caption"], dropped, strict=True)])
        noise = seeded_noise(self.seed, batch["index"], tuple(clean.shape[1:])).to(clean)
        timesteps = logit_normal_timesteps(random[:, 2], self.schedule.config.num_train_timesteps, *self.timesteps)
        noised = self.schedule.add_noise(clean, noise, timesteps)
        predicted = prior(noised, timesteps, text, encodings, mask).predicted_image_embedding.float()
        return (predicted - clean).square().mean(1), timesteps

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss, and the cosine of sampled to true embeddings beside that of the text embeddings themselves."""
        batch = default_collate([self.validation[i] for i in range(VALIDATION_EXAMPLES)])
        losses, timesteps = self._losses(batch)
        metrics = {"loss": losses.mean().item()}
        metrics |= {k: v.item() for k, v in levels(losses, timesteps, self.schedule.config.num_train_timesteps).items()}
        few = {k: v[:128] for k, v in batch.items()}
        true = self.frozen.image(few["image"].float() / 127.5 - 1)
        text, encodings, mask = self.frozen.text(few["caption"])
        null = self.frozen.text([""] * len(text))
        both = [torch.cat(pair) for pair in zip(null, (text, encodings, mask), strict=True)]
        prior = self.trained["prior"]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return prior(x, t, *both).predicted_image_embedding.float()

        start = seeded_noise(self.seed, few["index"], (self.frozen.dim,))
        drawn = prior.post_process_latents(denoise(predict, start, ddim(self.schedule), 10, guidance=2.0))
        metrics["cosine"] = F.cosine_similarity(drawn, true).mean().item()
        metrics["cosine_to_text"] = F.cosine_similarity(drawn, text).mean().item()
        metrics["cosine_true_to_text"] = F.cosine_similarity(true, text).mean().item()
        return metrics

    def components(self) -> dict[str, Any]:
        return {**self.trained, "prior_scheduler": ddim(self.schedule)}
