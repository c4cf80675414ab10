"""Training the diffusion prior (paper, section 2.2): x0 mean squared error on whitened CLIP image embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PriorTransformer
from torch import Tensor, nn

from prior import DiffusionPrior

from ..data.examples import seeded_noise
from ..diffusion import ddim
from ..sampling import denoise
from .conditioned import ClipConditioned, NoiseLevels, build, in_range


class PriorObjective(ClipConditioned):
    """Equation 2 of the paper, with the text (embedding and encodings together) dropped for a share of the examples.

    `model.class` may be PriorTransformer, diffusers' stock network, in Karlo's layout.
    """

    network, held_out = "prior", 512

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        drop_text: float = 0.1,
        whitening_examples: int = 2048,
        timesteps: str = "logit_normal",
        timestep_mean: float = 0.6,
        timestep_std: float = 1.2,
        min_snr: float | None = None,
        lora: dict | None = None,
    ):
        super().__init__(data, seed, clip, "sample", NoiseLevels(timesteps, timestep_mean, timestep_std), min_snr, lora)
        prior = build(model, DiffusionPrior, PriorTransformer)
        if isinstance(prior, DiffusionPrior):
            prior.register_to_config(clip_fingerprint=self.frozen.fingerprint)
        else:
            prior.clip_mean.requires_grad_(False)
            prior.clip_std.requires_grad_(False)
        self.trained = nn.ModuleDict({"prior": prior})
        self.drop_text, self.whitening_examples = drop_text, whitening_examples

    @torch.no_grad()
    def prepare(self) -> None:
        """Mean and standard deviation of every embedding dimension, from the first training examples."""
        embeds = torch.cat(
            [
                self.frozen.image(in_range(torch.stack([self.examples[i]["image"] for i in range(n, n + 128)])))
                for n in range(0, self.whitening_examples, 128)
            ]
        )
        prior = self.trained["prior"]
        prior.clip_mean.copy_(embeds.mean(0, keepdim=True))
        prior.clip_std.copy_(embeds.std(0, keepdim=True).clamp_min(1e-4))

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        prior = self.trained["prior"]
        clean = (self.frozen.image(in_range(batch["image"])) - prior.clip_mean) / prior.clip_std
        text, encodings, mask = self._text(batch["caption"], batch["random"][:, 0] < self.drop_text)
        noised, _, timesteps = self._noised(clean, batch)
        predicted = prior(noised, timesteps, text, encodings, mask).predicted_image_embedding.float()
        return self._squared_error(predicted, clean, timesteps), timesteps

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss, and the cosine of sampled to true embeddings beside that of the text embeddings themselves."""
        metrics = super().validate()
        few = self._held_out(128)
        true = self.frozen.image(in_range(few["image"]))
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
