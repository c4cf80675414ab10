"""The decoder: CLIP image embedding and text to images of 64 px (paper, section 2.1)."""

# B images, C channels, D embedding dimension, N text tokens, H height, W width

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from decoder import expand_to_context
from prior.blocks import KeyValueCache

from ...diffusion.sampling import DenoisingOptions, Predict, Scheduler
from ...runtime import attention
from ...runtime.compiling import compiled
from ..call import Call, in_batches
from ..samplers import ddim, inverse_ddim
from .clip_guidance import clip_guided
from .text import TextCondition

if TYPE_CHECKING:
    from ..base import UnCLIPBase


def decode(
    pipe: "UnCLIPBase", text: TextCondition, image_embeds: Tensor, call: Call, latents: Tensor | None = None
) -> Iterable[Tensor]:
    """Batches of images [B, 3, H, W] in [-1, 1] at the decoder's size, for image embeddings [B, D].

    Empty where the call was interrupted before.
    """
    return in_batches(pipe, _decode, call, text=text, image_embeds=image_embeds, latents=latents)


def _decode(pipe: "UnCLIPBase", text: TextCondition, image_embeds: Tensor, call: Call, latents: Tensor | None) -> Tensor:
    """One batch of `decode`."""
    if pipe.interrupt:
        return no_images(pipe, call)
    guidance, scheduler, settings = call.settings.guidance_scale("decoder"), call.decoder_scheduler, call.settings
    shape = (len(image_embeds), 3, call.height, call.width)
    with pipe._run_stage("decoder", "text_proj", "decoder", *(["image_encoder"] if call.clip_guidance else [])):
        start = pipe._starting_noise(shape, pipe.decoder, call.generator, latents)
        network = pipe.decoder if call.distilled is None else call.distilled.network(pipe.decoder)
        if pipe._shared.compiled:
            compiled(network, pipe._execution_device)
        predict = decoder_prediction(pipe, text, image_embeds, guidance, network=network)
        if call.clip_guidance:
            predict = clip_guided(predict, pipe._clip(), text.embeds, scheduler, guidance, call.clip_guidance)
        interval, shift = guided_timesteps(call, scheduler), settings.decoder_timestep_shift
        options = DenoisingOptions(guidance=guidance, interval=interval, shift=shift, eta=call.eta)
        steps = settings.decoder_num_inference_steps
        return pipe._denoise(predict, start, scheduler, steps, call, options).clamp(-1, 1)


def no_images(pipe: "UnCLIPBase", call: Call) -> Tensor:
    """An empty batch [0, 3, H, W], for a call that was interrupted before the decoder."""
    return torch.zeros(0, 3, call.height, call.width, device=pipe._execution_device)


def guided_timesteps(call: Call, scheduler: Scheduler) -> tuple[float, float]:
    """The lowest and the highest timestep with guidance of the decoder."""
    count = scheduler.config.num_train_timesteps
    low, high = (round(share * count, 6) for share in call.settings.decoder_guidance_interval)  # 0.29 of 100 is 29
    return low, high


def invert(pipe: "UnCLIPBase", images: Tensor, text: TextCondition, image_embeds: Tensor, call: Call) -> Tensor:
    """The noise [B, 3, H, W] from which DDIM without guidance samples `images` [B, 3, H, W] in [-1, 1] (paper, section 3)."""
    with pipe._run_stage("inversion", "text_proj", "decoder"):
        start = pipe._starting_noise(tuple(images.shape), pipe.decoder, None, images)
        predict = decoder_prediction(pipe, text, image_embeds, 1.0)
        steps = call.settings.decoder_num_inference_steps
        return pipe._denoise(predict, start, inverse_ddim(pipe.decoder_scheduler), steps, call)


def decoder_ddim(pipe: "UnCLIPBase", clip: bool = False) -> DDIMScheduler:
    """The sampler whose inverse is `invert`, with the decoder's noise levels."""
    return ddim(pipe.decoder_scheduler, clip)


@dataclass
class DecoderConditions:
    """The decoder's conditioning inputs; under guidance 2B rows, the unconditional half first.

    `encoder_hidden_states` [B, M, C] and their `mask` [B, M] bool; `time_embeds` [B, C], added to the time embedding; `draft`
    [B, 3, H, W] for decoders with one; `kv_cache` holds keys and values of the encoder hidden states by attention layer.
    """

    encoder_hidden_states: Tensor
    mask: Tensor
    time_embeds: Tensor
    draft: Tensor | None
    kv_cache: KeyValueCache
    is_compiled: bool  # then the mask is always given: without it there would be another graph
    _arguments: dict[int, dict[str, Any]] = field(default_factory=dict)

    def arguments(self, rows: int) -> dict[str, Any]:
        """The decoder's keyword arguments for the last `rows` rows."""
        if rows not in self._arguments:
            self._arguments[rows] = self._last(rows)
        return self._arguments[rows]

    def _last(self, rows: int) -> dict[str, Any]:
        mask = self.mask[-rows:]
        arguments: dict[str, Any] = {
            "encoder_hidden_states": self.encoder_hidden_states[-rows:],
            "class_labels": self.time_embeds[-rows:],
        }
        arguments["attention_mask"] = None if mask.all() and not self.is_compiled else mask
        if self.draft is not None:
            arguments["draft"] = self.draft[-rows:]
        if self.kv_cache:
            last = {layer: (keys[-rows:], values[-rows:]) for layer, (keys, values) in self.kv_cache.items()}
            arguments["cross_attention_kwargs"] = {"kv_cache": last}
        return arguments


def condition_inputs(
    pipe: "UnCLIPBase", text: TextCondition, image_embeds: Tensor, is_guided: bool, decoder: ModelMixin
) -> DecoderConditions:
    """CLIP conditioning of the decoder: image embeddings [B, D] and text through `text_proj`."""
    project = pipe.text_proj
    embeds, encodings, mask = text.inputs(is_guided)
    options = {"text_mask": mask} if getattr(project, "text_blocks", None) else {}  # diffusers' class has no such argument
    if text.style is not None and project.config.get("styles"):
        options["style"] = text.style
    image_embeds = image_embeds.to(project.dtype)
    hidden, time_embeds = project(
        **options,
        image_embeddings=image_embeds,
        prompt_embeds=embeds.to(project.dtype),
        text_encoder_hidden_states=encodings.to(project.dtype),
        do_classifier_free_guidance=is_guided,
    )
    hidden, time_embeds = hidden.to(decoder.dtype), time_embeds.to(decoder.dtype)
    draft = None
    if getattr(project, "draft_head", None) is not None:
        draft = project.draft_image(image_embeds, text.style, is_guided, encodings.to(project.dtype), mask).to(decoder.dtype)
    mask = expand_to_context(project, mask, True)
    is_used = mask.any(0)  # the others are padding in every row
    if pipe._shared.compiled:
        is_used = torch.ones_like(is_used)  # every length would have another graph
    kv_cache = attention.context_kv_cache(decoder, hidden[:, is_used])
    if kv_cache:
        hidden, mask = hidden[:, is_used], mask[:, is_used]
    return DecoderConditions(hidden, mask, time_embeds, draft, kv_cache, pipe._shared.compiled)


def decoder_prediction(
    pipe: "UnCLIPBase",
    text: TextCondition,
    image_embeds: Tensor,
    guidance: float,
    known: Tensor | None = None,
    network: ModelMixin | None = None,
) -> Predict:
    """The decoder as a function of the noised images and the timestep; under guidance for both halves, or for the second.

    `known` [1, 4, H, W] is for a decoder that was trained to inpaint: pixels outside the mask, and the mask; without it
    the mask is 1 everywhere. `network` replaces the decoder.
    """
    decoder = pipe.decoder if network is None else network
    conditions = condition_inputs(pipe, text, image_embeds, guidance != 1, decoder)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        sample = x
        if decoder.config["in_channels"] > x.shape[1]:
            hole = x.new_zeros(1, 4, *x.shape[2:])
            hole[:, 3] = 1
            sample = torch.cat([x, (hole if known is None else known.to(x)).expand(len(x), -1, -1, -1)], 1)
        output = decoder(sample=sample.to(decoder.dtype), timestep=t, **conditions.arguments(len(x)))
        # copied, because a CUDA graph writes its next output to the same place
        return output.sample.to(x.dtype, copy=pipe._shared.compiled)

    return predict
