"""Training the 64 px decoder (paper, section 2.1): a picture from its own CLIP embedding and its caption."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from decoder import Decoder, UnCLIPTextProjModel

from .. import attention
from ..config import construct
from ..data.examples import seeded_noise
from ..diffusion import dpm_solver, target
from ..sampling import denoise
from .base import grid
from .conditioned import ClipConditioned, in_range

SHOWN = 16


class DecoderObjective(ClipConditioned):
    """v-prediction on scenes, conditioned on the frozen CLIP's image embedding, text embedding and token encodings.

    `drop_both`, `drop_image` and `drop_text` are disjoint shares of the examples that lose the conditions named (a
    dropped text is the encoding of "", a dropped image the learned null embedding). `embedding_noise` blurs the image
    embedding by noise of up to that share of its length, because the prior's embeddings will be off by some. A
    `resolution` below the decoder's own trains on smaller pictures: colours and places are learned there at a quarter of
    the cost, and `init_from` carries them over.
    """

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        drop_both: float = 0.1,
        drop_image: float = 0.05,
        drop_text: float = 0.1,
        embedding_noise: float = 0.5,
        prediction_type: str = "v_prediction",
        resolution: int | None = None,
        timestep_mean: float = 0.2,
        timestep_std: float = 1.2,
    ):
        super().__init__(data, seed, clip, prediction_type, (timestep_mean, timestep_std))
        decoder = construct(Decoder, model, "model")
        text_proj = UnCLIPTextProjModel(
            clip_embeddings_dim=self.frozen.dim,
            time_embed_dim=decoder.config.time_embed_dim,
            cross_attention_dim=decoder.config.cross_attention_dim,
            embedding_scale=self.frozen.dim**0.5,
            clip_fingerprint=self.frozen.fingerprint,
        )
        self.trained = nn.ModuleDict({"decoder": attention.install(decoder), "text_proj": text_proj})
        self.drops, self.embedding_noise = (drop_both, drop_image, drop_text), embedding_noise
        self.resolution = resolution or decoder.config.sample_size

    def compile_networks(self) -> None:
        self.trained["decoder"].compile()

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per-example losses [B] and their timesteps [B]."""
        clean, image_embeds = self._pictures(batch)
        random = batch["random"]
        both, image, text = self.drops
        no_text = (random[:, 0] < both) | (random[:, 0] >= 1 - text)
        no_image = random[:, 0] < both + image
        deviation = seeded_noise(self.seed + 1, batch["index"], (self.frozen.dim,)).to(clean) / self.frozen.dim**0.5
        blurred = F.normalize(image_embeds + self.embedding_noise * random[:, 1, None] * deviation, dim=-1)
        null = self.trained["text_proj"].learned_classifier_free_guidance_embeddings
        image_embeds = torch.where(no_image[:, None], null, blurred)
        noised, noise, timesteps = self._noised(clean, batch)
        context, added, mask = self._conditions(self._text(batch["caption"], no_text), image_embeds)
        predicted = self.trained["decoder"](noised, timesteps, context, class_labels=added, attention_mask=mask).sample
        wanted = target(self.schedule, clean, noise, timesteps)
        return (predicted.float() - wanted).square().mean((1, 2, 3)), timesteps

    def _pictures(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, R, R] in [-1, 1] at the training resolution R, and the embeddings [B, D] of the full ones."""
        full = in_range(batch["image"])
        return F.avg_pool2d(full, full.shape[-1] // self.resolution), self.frozen.image(full)

    def _conditions(self, text: tuple[Tensor, Tensor, Tensor], image_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Context tokens [B, 4 + N, K], the addition to the time embedding [B, T] and the context's mask [B, 4 + N]."""
        text_embeds, encodings, mask = text
        project = self.trained["text_proj"]
        context, added = project(image_embeddings=image_embeds, prompt_embeds=text_embeds, text_encoder_hidden_states=encodings)
        return context, added, F.pad(mask, (project.clip_extra_context_tokens, 0), value=True)

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out scenes: true pictures, drawn from embedding and caption, and drawn from the caption alone."""
        batch = self._held_out(SHOWN)
        clean, embeds = self._pictures(batch)
        null = self.trained["text_proj"].learned_classifier_free_guidance_embeddings.expand(SHOWN, -1)
        start = seeded_noise(self.seed, batch["index"], tuple(clean.shape[1:]))
        empty = self._conditions(self.frozen.text([""] * SHOWN), null)
        text = self.frozen.text(batch["caption"])
        rows = [clean]
        for image_embeds in (embeds, null):
            pairs = zip(empty, self._conditions(text, image_embeds), strict=True)
            context, added, mask = (torch.cat(pair) for pair in pairs)

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return self.trained["decoder"](x, t, context, class_labels=added, attention_mask=mask).sample.float()  # noqa: B023

            rows.append(denoise(predict, start, dpm_solver(self.schedule), 16, guidance=2.0))
        return grid(torch.cat(rows) / 2 + 0.5, SHOWN)

    def components(self) -> dict[str, Any]:
        return {**self.trained, "decoder_scheduler": dpm_solver(self.schedule)}
