"""Training the 64 px decoder (paper, section 2.1): an image from its own CLIP embedding and its caption."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from decoder import Decoder, expand_to_context

from ... import networks
from ...data.examples import EmojiScenes, seeded_noise
from ...data.layouts import MAX_LAYERS, PLACES
from ...diffusion.predictions import target
from ...diffusion.sampling import DenoisingOptions, denoise
from ...diffusion.schedules import ancestral, dpm_solver, levels, variational_bound
from ...io.pixels import normalize
from ...runtime.config import ConfigError
from .base import grid
from .conditioned import ClipConditioned, NoiseLevels, check_shares, new_weights
from .frozen_clip import name_tokens
from .grounding import Grounding, IconEmbeddings
from .icon_bank import IconBank, load_icon_bank
from .random_columns import (
    CONDITION_NOISE,
    DROP_BOTH,
    DROP_DRAFT,
    DROP_IMAGE,
    DROP_STYLE,
    DROP_TEXT,
    EMBEDDING_NOISE,
    HOLE,
    IMAGE_NOISE,
    USE_SAMPLED,
    WHICH_SAMPLE,
)

SAMPLES = 16
GAINED_LAYERS = ("draft_in", "position_embeddings", "style_embedding")  # weights may lack them at the start


class DecoderObjective(ClipConditioned):
    """Denoising of scenes, conditioned on the frozen CLIP's image embedding, text embedding and token encodings.

    `drop_image` and `drop_text` are the shares of the examples without each condition, independently of each other (paper,
    section 2.1), after a share `drop_both` without both (a dropped text is the encoding of "", a dropped image the learned
    null embedding). `embedding_noise` is the largest norm of the noise added to image embeddings, because the prior's have
    errors; 0 adds none. A `resolution` below the decoder's own trains on smaller images: colours and places are learned
    there at a quarter of the cost, and `init_from` carries them over.

    With `model.out_channels` 6 the variance is learned too, by the hybrid loss with `vlb_weight` for lambda (arXiv
    2102.09672, equation 16). With `model.in_channels` 7 the decoder is trained to inpaint: its input has the image outside a
    random rectangle, and the rectangle's mask (GLIDE, arXiv 2112.10741, section 4.3). Weights that `init_from` holds for 3
    channels are carried over, new ones start at zero; weights of text layers, positions and `text_images` may be missing too.
    `model.class` may be UNet2DConditionModel, diffusers' stock network, in Karlo's layout.

    `grounding` weighs a second loss, for examples that say what and where the things are that their captions name
    (`EmojiScenes`): of two names, a pixel should attend to that of the thing which covers it, and the image embedding that is
    predicted for a name (`text_images` of `text_proj`) should be near CLIP's of the thing alone (`Grounding`). It is added in
    every `grounding_every`th batch.

    Where `text_proj` has a draft head and the decoder `draft_channels`, the draft of the image embedding is an input, left
    out in `drop_draft` of the examples; the head itself is not trained here. With `layout` the draft of a scene is composed
    of its objects' drafts in their true places, in a share `sampled` from the embeddings that are predicted from the text.
    Layers that the starting weights lack (`GAINED_LAYERS`) learn at `gained_rate` times the learning rate.
    Where it has `styles`, the style is dropped in `drop_style` of the examples. With `prior` (a run's or a pipeline's) a
    share `sampled` of single icons in their pose has an image embedding that the prior sampled for a caption of theirs, of
    `samples` for each icon.
    """

    network, optional_init = "decoder", ("decoder",)
    load_icon_bank = load_icon_bank

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        drop_image: float = 0.1,
        drop_text: float = 0.5,
        drop_both: float = 0.0,
        embedding_noise: float = 0.5,
        prediction_type: str = "v_prediction",
        resolution: int | None = None,
        timesteps: str = "logit_normal",
        timestep_mean: float = 0.2,
        timestep_std: float = 1.2,
        min_snr: float | None = None,
        vlb_weight: float = 1e-3,
        grounding: float = 0.0,
        grounding_every: int = 1,
        drop_draft: float = 0.1,
        gained_rate: float = 1.0,
        drop_style: float = 0.1,
        prior: str | None = None,
        sampled: float = 0.5,
        samples: int = 4,
        lora: dict | None = None,
    ):
        check_shares(drop_image=drop_image, drop_text=drop_text, drop_both=drop_both)
        check_shares(drop_draft=drop_draft, drop_style=drop_style, sampled=sampled)
        super().__init__(data, seed, clip, prediction_type, NoiseLevels(timesteps, timestep_mean, timestep_std), min_snr, lora)
        self.trained = networks.decoder(model, self.frozen.dim, self.frozen.fingerprint)
        self._set_channels(prediction_type)
        self.drops, self.embedding_noise, self.vlb_weight = (drop_both, drop_image, drop_text), embedding_noise, vlb_weight
        self.drop_draft, self.drop_style, self.gained_rate = drop_draft, drop_style, gained_rate
        if not gained_rate > 0:
            raise ConfigError(f"objective.gained_rate must be above 0, got {gained_rate}")
        for frozen in (self.text_proj.draft_head, self.text_proj.layout_predictor):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.icon_bank: IconBank | None = None
        self.sampled = sampled
        if prior is not None:
            if not isinstance(self.examples, EmojiScenes):
                raise ConfigError("objective.prior needs emoji scenes, whose single icons it samples embeddings for")
            self.icon_bank = self.load_icon_bank(data, prior, samples)
        elif self.text_proj.layout_predictor is not None:
            raise ConfigError("model.text_proj.layout needs objective.prior, and emoji scenes")
        self._set_grounding(grounding, grounding_every)
        self.resolution: int = self.decoder.config.sample_size if resolution is None else resolution
        if self.resolution < 1 or self.examples.size % self.resolution:
            raise ConfigError(
                f"data.size is {self.examples.size}, which is no multiple of the {self.resolution} px that the decoder is "
                "trained at (objective.resolution, else model.sample_size)"
            )

    @property
    def decoder(self) -> Any:
        return self.trained["decoder"]

    @property
    def text_proj(self) -> Any:
        return self.trained["text_proj"]

    def _set_channels(self, prediction_type: str) -> None:
        """Raises ConfigError for numbers of channels that there are not, and for ones that the prediction type excludes."""
        decoder = self.decoder
        inputs, outputs = decoder.config.in_channels, decoder.config.out_channels
        if inputs not in (3, 7) or outputs not in (3, 6):
            raise ConfigError(f"model.in_channels must be 3 or 7 and model.out_channels 3 or 6, got {inputs} and {outputs}")
        if outputs == 6 and prediction_type == "v_prediction":
            raise ConfigError("a learned variance goes with objective.prediction_type epsilon or sample, not v_prediction")
        self.inpainting, self.learned_variance = inputs == 7, outputs == 6
        if getattr(decoder, "draft_out", None) is not None:
            if prediction_type != "v_prediction":
                raise ConfigError(f"model.draft_skip needs objective.prediction_type v_prediction, got {prediction_type}")
            decoder.draft_out.alphas_cumprod.copy_(self.schedule.alphas_cumprod)

    def _set_grounding(self, weight: float, every: int) -> None:
        """Raises ConfigError for a weight or interval out of range, and for examples or a decoder that cannot be grounded."""
        for name, value, least in (("grounding", weight, 0), ("grounding_every", every, 1)):
            if value < least:
                raise ConfigError(f"objective.{name} must be at least {least}, got {value}")
        self.grounding, self.grounding_every = weight, every
        if weight:
            if not (isinstance(self.examples, EmojiScenes) and isinstance(self.decoder, Decoder)):
                raise ConfigError("objective.grounding needs emoji scenes, which know what is where, and our own decoder")
            self.icon_embeds = IconEmbeddings(self.examples.icons, self.frozen)

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state |= new_weights(self.trained[name], state)
        return widen_channels(self.decoder, state) if name == "decoder" else state

    def parameter_groups(self) -> Iterator[tuple[dict[str, nn.Parameter], float]]:
        named = self.trained_parameters()
        new = {n for n in named if n.split(".")[1] in GAINED_LAYERS}
        yield {n: p for n, p in named.items() if n not in new}, 1.0
        yield {n: p for n, p in named.items() if n in new}, self.gained_rate

    def tokenize(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.frozen.tokenize(batch["caption"], self.fixes_lengths, offsets=bool(self.grounding))

    @torch.no_grad()
    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        batch = super().to_tensors(batch)
        if self.grounding and int(batch["index"][0]) // len(batch["index"]) % self.grounding_every == 0:
            batch["names"] = name_tokens(batch.pop("offsets"), batch["spans"])
            batch["icon_embeds"] = self.icon_embeds(batch["rows"])
        if self.icon_bank is not None:
            batch["sampled_embeds"] = self.icon_bank.sampled(batch["icon"].clamp_min(0), batch["random"][:, WHICH_SAMPLE])
            if self.text_proj.layout_predictor is not None:
                batch["layer_embeds"] = self.icon_bank.embeds()[batch["layers"].clamp_min(0)]
        return batch

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if "names" not in batch:
            return super().compute_loss(batch)
        names = batch["names"].masked_fill(self.dropped(batch["random"])[1][:, None], 0)
        grounding = Grounding(names, batch["sides"], batch["icon_embeds"])
        losses, timesteps = self.example_losses(batch, grounding)
        grounding_loss, metrics = grounding.losses()
        found = levels(losses.detach(), timesteps, self.schedule.config.num_train_timesteps)
        return losses.mean() + self.grounding * grounding_loss, found | metrics

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        batch, dim = super().dummy_batch(size), self.frozen.dim
        if self.text_proj.config.get("styles"):
            batch["style"] = torch.zeros(size, dtype=torch.long)
        if self.grounding:
            batch["names"] = torch.zeros(size, batch["mask"].shape[1], dtype=torch.int8)
            batch["sides"] = torch.zeros(size, PLACES, PLACES, dtype=torch.int8)
            batch["icon_embeds"] = torch.zeros(size, 2, dim)
        if self.icon_bank is not None:
            batch |= {"icon": torch.full((size,), -1), "sampled_embeds": torch.zeros(size, dim)}
        if self.text_proj.layout_predictor is not None:
            batch |= {"boxes": torch.zeros(size, MAX_LAYERS, 3), "layers": torch.full((size, MAX_LAYERS), -1)}
            batch |= {"background": torch.zeros(size, 3), "layer_embeds": torch.zeros(size, MAX_LAYERS, dim)}
        return batch

    def example_losses(self, batch: dict[str, Tensor], grounding: Grounding | None = None) -> tuple[Tensor, Tensor]:
        """Per-example losses [B] and their timesteps [B]; the outputs that `grounding` needs are stored in it."""
        clean, image_embeds = self.images_and_embeddings(batch)
        text, image_embeds = self.condition_inputs(batch, image_embeds)
        noised, noise, timesteps = self.add_noise(clean, batch)
        style = self.style(batch)
        drafts = self.training_drafts(batch, text, image_embeds, style)
        conditions = self.conditions(text, image_embeds, style, drafts, grounding)
        inputs = torch.cat([noised, self.inpainting_input(clean, batch["random"])], 1)
        if grounding is not None:
            conditions["cross_attention_kwargs"] = {"names": expand_to_context(self.text_proj, grounding.names, 0)}
        output = self.decoder(inputs, timesteps, **conditions)
        if grounding is not None:
            grounding.shares = output.name_shares
        predicted = output.sample.float()
        predicted, share = predicted[:, :3], predicted[:, 3:]
        losses = self.squared_error(predicted, target(self.schedule, clean, noise, timesteps), timesteps)
        if self.learned_variance:
            # the bound trains the variance alone; it is a sum over timesteps, of which each example is one
            bound = variational_bound(self.schedule, predicted.detach(), share, clean, noised, timesteps)
            losses = losses + self.vlb_weight * self.schedule.config.num_train_timesteps * bound
        return losses, timesteps

    def condition_inputs(self, batch: dict[str, Tensor], image_embeds: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Text features and image embeddings [B, D] as the decoder is trained with them: with noise, or dropped."""
        random = batch["random"]
        no_image, no_text = self.dropped(random)
        noisy = image_embeds
        if self.embedding_noise:
            deviation = seeded_noise(self.seed + CONDITION_NOISE, batch["index"], image_embeds) / self.frozen.dim**0.5
            noisy = F.normalize(image_embeds + self.embedding_noise * random[:, EMBEDDING_NOISE, None] * deviation, dim=-1)
        if self.icon_bank is not None:
            noisy = self.with_sampled_embeddings(batch, noisy)
        null = self.text_proj.learned_classifier_free_guidance_embeddings
        return self.encode_text(batch, no_text), torch.where(no_image[:, None], null, noisy)

    def with_sampled_embeddings(self, batch: dict[str, Tensor], image_embeds: Tensor) -> Tensor:
        """`image_embeds` [B, D] with those that the prior sampled in place of a share of the single icons'."""
        chosen = (batch["icon"] >= 0) & (batch["random"][:, USE_SAMPLED] < self.sampled)
        return torch.where(chosen[:, None], batch["sampled_embeds"], image_embeds)

    def style(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The styles [B] that the decoder is conditioned on, as `text_proj` numbers them; None where there are none."""
        styles = self.text_proj.config.get("styles") or ()
        if not styles or "style" not in batch:
            return None
        random = batch["random"]
        no_style = (random[:, DROP_STYLE] < self.drop_style) | (random[:, DROP_BOTH] < self.drops[0])
        return torch.where(no_style, len(styles), batch["style"])

    def dropped(self, random: Tensor) -> tuple[Tensor, Tensor]:
        """Which examples are trained without image embedding, and which without text: [B] bool each, of `random` [B, 16]."""
        both, image, text = self.drops
        no_both = random[:, DROP_BOTH] < both
        return no_both | (random[:, DROP_IMAGE] < image), no_both | (random[:, DROP_TEXT] < text)

    def inpainting_input(self, clean: Tensor, random: Tensor) -> Tensor:
        """An inpainting decoder's further channels [B, 4, R, R]: images [B, 3, R, R] outside of a mask, and the mask.

        No channels of another decoder.
        """
        if not self.inpainting:
            return clean[:, :0]
        mask = inpainting_masks(random[:, HOLE], clean.shape[-1]).to(clean)
        return torch.cat([clean * (1 - mask), mask], 1)

    def images_and_embeddings(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, R, R] in [-1, 1] at the training resolution R, and the embeddings [B, D] of the full ones."""
        full = normalize(batch["image"])
        return F.avg_pool2d(full, full.shape[-1] // self.resolution), self.encode_image(batch)

    def conditions(
        self,
        text: tuple[Tensor, Tensor, Tensor],
        image_embeds: Tensor,
        style: Tensor | None = None,
        draft: Tensor | None = None,
        grounding: Grounding | None = None,
    ) -> dict[str, Any]:
        """The decoder's arguments beside sample and timestep, all [B, ...]; `draft` replaces that of embeddings and text."""
        text_embeds, encodings, mask = text
        project = self.text_proj
        named = {} if style is None else {"style": style}
        context, added, guess = project(
            image_embeddings=image_embeds,
            prompt_embeds=text_embeds,
            text_encoder_hidden_states=encodings,
            text_mask=mask,
            return_guess=True,
            **named,
        )
        if grounding is not None:
            grounding.guess = guess
        mask = expand_to_context(project, mask, True)
        conditions = {"encoder_hidden_states": context, "class_labels": added, "attention_mask": mask}
        if draft is None:
            draft = project.draft_image(image_embeds, style, text_encoder_hidden_states=encodings, text_mask=text[2])
        if draft is not None:
            conditions["draft"] = draft.float()
        return conditions

    def training_drafts(
        self, batch: dict[str, Tensor], text: tuple[Tensor, Tensor, Tensor], image_embeds: Tensor, style: Tensor | None
    ) -> Tensor | None:
        """The drafts of a batch, some of them dropped (zeros); None without a draft head. `text` is from `encode_text`."""
        draft, random = self.text_proj.draft_image(image_embeds, style), batch["random"]
        if draft is None:
            return None
        if self.text_proj.layout_predictor is not None:
            scenes = scene_drafts(self.text_proj, batch, text[1:], style, random[:, USE_SAMPLED] < self.sampled)
            scenes = scenes * ~self.dropped(random)[1][:, None, None, None]
            draft = torch.where((batch["icon"] >= 0)[:, None, None, None], draft, scenes)
        return draft * (random[:, DROP_DRAFT] >= self.drop_draft)[:, None, None, None]

    def guided_conditions(self, batch: dict[str, Tensor], conditional: dict[str, Tensor]) -> dict[str, Tensor]:
        """`conditions` of a batch with the unconditional ones before them: [2B, ...]."""
        project, count = self.text_proj, len(conditional["class_labels"])
        null = project.learned_classifier_free_guidance_embeddings.expand(count, -1)
        no_draft = torch.zeros_like(conditional["draft"]) if "draft" in conditional else None
        unconditional = self.conditions(self.encode_empty_text(batch), null, draft=no_draft)
        return {name: torch.cat([unconditional[name], value]) for name, value in conditional.items()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out scenes: true images, sampled from embedding and caption, and sampled from the caption alone."""
        return sample_grid(self, self.held_out_batch(SAMPLES))

    def components(self) -> dict[str, Any]:
        scheduler = ancestral(self.schedule) if self.learned_variance else dpm_solver(self.schedule.config)
        return {**self.trained, "decoder_scheduler": scheduler}


def sample_grid(objective: DecoderObjective, batch: dict[str, Tensor]) -> Image.Image:
    """True images of a batch; sampled from embedding and caption; and sampled from the caption alone."""
    count = len(batch["random"])
    clean, embeds = objective.images_and_embeddings(batch)
    null = objective.text_proj.learned_classifier_free_guidance_embeddings.expand(count, -1)
    start = seeded_noise(objective.seed + IMAGE_NOISE, batch["index"], clean)
    text = objective.encode_text(batch)
    inpainting = objective.inpainting_input(clean, batch["random"]).repeat(2, 1, 1, 1)
    rows = [clean]
    for image_embeds in (embeds, null):
        conditions = objective.guided_conditions(batch, objective.conditions(text, image_embeds, batch.get("style")))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            inputs = torch.cat([x, inpainting], 1)
            return objective.decoder(inputs, t, **conditions).sample.float()  # noqa: B023

        rows.append(denoise(predict, start, dpm_solver(objective.schedule.config), 16, DenoisingOptions(guidance=2.0)))
    return grid(torch.cat(rows) / 2 + 0.5, count)


def inpainting_masks(random: Tensor, size: int) -> Tensor:
    """Masks [B, 1, size, size] of a rectangle to inpaint (1); for a fifth of the examples, of the whole image.

    `random` [B, 5] uniform in [0, 1): centre, sides, and whether it is the whole image.
    """
    place = torch.arange(size, device=random.device)[None] / size  # [1, R]
    sides = 0.1 + 0.8 * random[:, 2:4]
    inside = [((place - random[:, n, None]).abs() * 2 <= sides[:, n, None]) | (random[:, 4, None] < 0.2) for n in (0, 1)]
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()


def scene_drafts(
    project: Any, batch: dict[str, Tensor], text: tuple[Tensor, Tensor], style: Tensor | None, predicted: Tensor
) -> Tensor:
    """Drafts [B, 3, S, S] of scenes, their objects in the true places, from CLIP's embeddings of the objects.

    Where `predicted` [B], from those that `project` predicts from the text: encodings [B, N, D] and mask [B, N].
    """
    layout, guess = project.predict_layout(*text)
    embeds = torch.where(predicted[:, None, None], layout.embeddings(guess), batch["layer_embeds"])
    return project.compose(embeds, batch["boxes"], batch["layers"] >= 0, batch["background"], style)


def widen_channels(decoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with zeros for the input and output channels that `decoder` has in addition; the image's come first."""
    for layer, dim in (("conv_in.weight", 1), ("conv_out.weight", 0), ("conv_out.bias", 0)):
        if layer not in state:
            continue
        weight = state[layer]
        missing = list(weight.shape)
        missing[dim] = decoder.get_parameter(layer).shape[dim] - weight.shape[dim]
        if missing[dim] > 0:
            state[layer] = torch.cat([weight, weight.new_zeros(missing)], dim)
    return state
