"""Training the diffusion prior (paper, section 2.2): x0 mean squared error on whitened CLIP image embeddings."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prior import DiffusionPrior

from ... import networks
from ...data.examples import seeded_noise
from ...diffusion.sampling import DenoisingOptions, denoise
from ...diffusion.schedules import ddim
from .conditioned import ClipConditioned, NoiseLevels, check_counts, check_shares, cosines, new_weights
from .random_columns import DROP_BOTH, DROP_STYLE


class PriorObjective(ClipConditioned):
    """Equation 2 of the paper, with the text (embedding and encodings together) dropped for a share of the examples.

    `model.class` may be PriorTransformer, diffusers' stock network, in Karlo's layout. A prior with `styles` is conditioned on
    the example's, except in `drop_style` of the examples and where the text is dropped.
    """

    network, held_out, reads_images = "prior", 512, False

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        drop_text: float = 0.1,
        drop_style: float = 0.1,
        whitening_examples: int = 2048,
        timesteps: str = "logit_normal",
        timestep_mean: float = 0.6,
        timestep_std: float = 1.2,
        min_snr: float | None = None,
        lora: dict | None = None,
    ):
        check_shares(drop_text=drop_text, drop_style=drop_style)
        check_counts(whitening_examples=whitening_examples)
        super().__init__(data, seed, clip, "sample", NoiseLevels(timesteps, timestep_mean, timestep_std), min_snr, lora)
        self.trained = nn.ModuleDict({"prior": networks.prior(model, self.frozen.dim, self.frozen.fingerprint)})
        self.drop_text, self.drop_style, self.whitening_examples = drop_text, drop_style, whitening_examples

    @property
    def fixes_lengths(self) -> bool:
        return super().fixes_lengths or not isinstance(self.trained["prior"], DiffusionPrior)

    @torch.no_grad()
    def prepare(self, device: torch.device | str = "cpu", progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Mean and standard deviation of every embedding dimension, from the first training examples."""
        first = self.first_batches(self.whitening_examples, device, progress)
        embeds = torch.cat([self.encode_image(batch).cpu() for batch in first])
        prior: Any = self.trained["prior"]
        prior.clip_mean.copy_(embeds.mean(0, keepdim=True))
        prior.clip_std.copy_(embeds.std(0, keepdim=True).clamp_min(1e-4))

    def example_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        prior: Any = self.trained["prior"]
        clean = (self.encode_image(batch) - prior.clip_mean) / prior.clip_std
        text, encodings, mask = self.encode_text(batch, batch["random"][:, DROP_BOTH] < self.drop_text)
        noised, _, timesteps = self.add_noise(clean, batch)
        style = self.style(batch)
        predicted = prior(noised, timesteps, text, encodings, mask, **style).predicted_image_embedding.float()
        return self.squared_error(predicted, clean, timesteps), timesteps

    def style(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The argument `style` [B] of a prior that has styles, where the examples have one."""
        prior: Any = self.trained["prior"]
        styles = prior.config.get("styles") or ()
        if not styles or "style" not in batch:
            return {}
        random = batch["random"]
        dropped = (random[:, DROP_BOTH] < self.drop_text) | (random[:, DROP_STYLE] < self.drop_style)
        return {"style": torch.where(dropped, len(styles), batch["style"])}

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | new_weights(self.trained[name], state)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss, and the cosine of sampled to true embeddings beside that of the text embeddings themselves."""
        metrics = super().validate()
        few = self.held_out_batch(128)
        true = self.encode_image(few)
        text, encodings, mask = self.encode_text(few)
        both = [torch.cat(pair) for pair in zip(self.encode_empty_text(few), (text, encodings, mask), strict=True)]
        prior: Any = self.trained["prior"]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return prior(x, t, *both).predicted_image_embedding.float()

        start = seeded_noise(self.seed, few["index"], true)
        sampled = prior.post_process_latents(denoise(predict, start, ddim(self.schedule), 10, DenoisingOptions(guidance=2.0)))
        return metrics | cosines(sampled, true, text)

    def components(self) -> dict[str, Any]:
        return {**self.trained, "prior_scheduler": ddim(self.schedule)}
