"""Text to image, with the interface of diffusers' deprecated `UnCLIPPipeline`, up to 1024 px."""

# B images, D embedding dimension, N text tokens

import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor, nn

from ..diffusion.sampling import Generators, Predict
from ..runtime.config import nearest
from .base import Callback, CallOptions, StepCallback, UnCLIPBase
from .components import is_autoregressive
from .stages import TextCondition, decode, encode_prompt, sample_prior, upsample_256, upsample_1024
from .stages.decoder import decoder_prediction
from .stages.prior import null_embedding
from .stages.styles import choose_styles
from .stages.text import count_prompts, encoded_text

PRIORS = ("diffusion", "autoregressive", "none")


class UnCLIPPipeline(UnCLIPBase):
    """Prompt -> text embedding -> image embedding -> 64 px -> 256 px -> 1024 px.

    The networks may be this package's or diffusers' (Karlo's layout), which have the same interface. `defaults` are the
    checkpoint's sampling settings; they are saved with it, and used for arguments that are None.
    """

    model_cpu_offload_seq = (
        "text_encoder->image_encoder->prior->text_proj->decoder->"  # type: ignore[assignment]  # DiffusionPipeline declares None
        "super_res_first->super_res_last->upsampler_1024"
    )
    _optional_components = [
        "prior_scheduler",  # an autoregressive prior needs none
        "super_res_last",
        "image_encoder",
        "feature_extractor",
        "upsampler_1024",
        "upsampler_1024_scheduler",
    ]

    def __init__(  # noqa: PLR0913 - a component each, as in diffusers
        self,
        prior: nn.Module,
        decoder: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        text_proj: nn.Module,
        super_res_first: nn.Module,
        super_res_last: nn.Module | None,
        prior_scheduler: Any,
        decoder_scheduler: Any,
        super_res_scheduler: Any,
        image_encoder: nn.Module | None = None,
        feature_extractor: Any = None,
        upsampler_1024: nn.Module | None = None,
        upsampler_1024_scheduler: Any = None,
        defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._register(
            defaults,
            prior=prior,
            decoder=decoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_proj=text_proj,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            prior_scheduler=prior_scheduler,
            decoder_scheduler=decoder_scheduler,
            super_res_scheduler=super_res_scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            upsampler_1024=upsampler_1024,
            upsampler_1024_scheduler=upsampler_1024_scheduler,
        )

    @torch.no_grad()
    def __call__(  # noqa: PLR0913 - diffusers' interface
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int | None = None,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | None = None,
        generator: Generators = None,
        prior_latents: Tensor | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | None = None,
        text_model_output: Any = None,
        text_attention_mask: Tensor | None = None,
        prior_guidance_scale: float | None = None,
        decoder_guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: str | list[str] | None = None,
        decoder_guidance_interval: tuple[float, float] | None = None,
        decoder_timestep_shift: float | None = None,
        sampler: str | None = None,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        prior: str | None = None,
        prior_candidates: int | None = None,
        upsampler_1024_num_inference_steps: int | None = None,
        upsampler_noise_level: float | None = None,
        clip_guidance: float = 0.0,
        image_embeds: Tensor | None = None,
        style: str | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample `num_images_per_prompt` images for each prompt.

        Arguments that are None have the checkpoint's defaults, else 25/25/7 steps and guidance scales 4/8.

        Args:
            prompt: a sentence or a list of them; may be None when `text_model_output` and `text_attention_mask` are given.
            generator: one generator for the batch, or a list with one for each image, with which a seed gives the same image
                alone and in a batch.
            prior_latents, decoder_latents, super_res_latents: the stages' starting noise, [B, D], [B, 3, 64, 64],
                [B, 3, 256, 256].
            text_model_output: (text embeddings [B, D], token encodings [B, N, D]) instead of a prompt.
            prior_guidance_scale, decoder_guidance_scale: 1 is no guidance; if no scale exceeds 1, guidance is off everywhere.
            output_type: "pil", "np" ([B, H, W, 3] in [0, 1]) or "pt" ([B, 3, H, W] in [0, 1]).
            negative_prompt: text of guidance's unconditional half, for all prompts or one for each; default: the empty text.
            decoder_guidance_interval: (low, high) in shares of the decoder's timesteps, 0 the clean image and 1 pure noise:
                outside it there is no guidance, which halves the cost of such a step (arXiv 2404.07724); default: everywhere.
            decoder_timestep_shift: above 1 the decoder has more of its steps at high noise (`shift_timesteps`), with the
                samplers that accept timesteps: dpmsolver++, and ancestral without a learned variance; default: 1.
            sampler: of the decoder: "dpmsolver++2m", "ddim" or "ancestral"; default: the checkpoint's scheduler.
                Where the checkpoint has a distilled decoder, "distilled" samples with it: with at most as many steps as it
                was distilled for, and without other guidance than it was distilled with (`samplers` lists all).
            size: the side of the images in pixels, one of `sizes`; stages above it do not run.
            height, width: of the images in pixels, where they are not `size` by `size`. An image larger than its
                upsampler was trained for is upsampled in overlapping tiles.
            prior: the source of image embeddings: "diffusion" or "autoregressive" requires this kind of checkpoint;
                "none" leaves them out, so that the decoder is conditioned on the text alone (paper, section 5.1); default: the
                checkpoint's prior.
            prior_candidates: image embeddings sampled for each image, the nearest to the text is used (paper, section 2.2).
            upsampler_noise_level: standard deviation of the noise that is added to an upsampler's input, in units of [-1, 1],
                for noise-conditioned upsamplers; default: none.
            clip_guidance: scale of CLIP guidance of the decoder, beside classifier-free guidance: 0 for none, 0.1 for a little.
                Takes about three times as long.
            image_embeds: CLIP image embeddings [B, D], one for each image, instead of the prior's (as sampled by
                `UnCLIPPriorPipeline`).
            style: the drawing style, for checkpoints that are conditioned on styles (`styles`); default: the one that the
                prompt names ("a cat, flat style"), else one at random for each image.
            callback_on_step_end: called as (pipe, step, timestep, {"latents": ...}) after every step of every stage, which
                `pipe.stage` names; may return {"latents": ...} to replace them, and set `pipe._interrupt` to end the call
                (`interrupt` documents the result).
            callback_on_step_end_tensor_inputs: the tensors that it gets: "latents", which are noisy until the last step, and
                "pred_original_sample", of the same shape, the x0 estimate of the step; default: ["latents"].

        Raises:
            ValueError: for an argument out of range, naming its value.
        """
        count = count_prompts(self, prompt, text_model_output, text_attention_mask)
        self._check_prior(prior, image_embeds, prior_latents)
        self._check_clip_guidance(clip_guidance)
        settings = self._settings(locals(), sampler)
        extent = self._extent(size, height, width)
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = CallOptions(extent, output_type, callback, sampler)
        call = self._begin(settings, count, num_images_per_prompt, generator, options)
        call.clip_guidance = clip_guidance
        self._check_super_res_latents(call, super_res_latents)

        encoded = encoded_text(self, text_model_output, text_attention_mask)
        text = encode_prompt(self, prompt, negative_prompt, num_images_per_prompt, encoded)
        text.style = choose_styles(self, style, prompt, len(text), generator)
        if image_embeds is not None:
            image_embeds = self._check_image_embeds(image_embeds, text)
        elif prior == "none":
            image_embeds = null_embedding(self, text)
        else:
            image_embeds = sample_prior(self, text, call, prior_latents)
        images = decode(self, text, image_embeds, call, decoder_latents)
        images = upsample_256(self, images, call, super_res_latents)
        images = upsample_1024(self, images, call)
        return self._finish(images, output_type, return_dict)

    def _check_prior(self, prior: str | None, image_embeds: Tensor | None, prior_latents: Tensor | None) -> None:
        """Raises ValueError for an unknown or another kind of prior, and for arguments of a prior that does not run."""
        if prior not in (None, *PRIORS):
            raise ValueError(f"unknown prior {prior!r}{nearest(str(prior), PRIORS)}; choose from {', '.join(PRIORS)}")
        if prior is not None and image_embeds is not None:
            raise ValueError(f"image_embeds take the prior's place: give them, or prior {prior!r}")
        kind = "autoregressive" if is_autoregressive(self.prior) else "diffusion"
        if prior not in (None, "none", kind):
            raise ValueError(f"this checkpoint's prior is {kind}, not {prior}")
        if prior_latents is not None and (image_embeds is not None or prior == "none"):
            raise ValueError("prior_latents start the prior, which does not run here: leave them out")

    def _check_clip_guidance(self, strength: float) -> None:
        """Raises ValueError for a strength out of range, and for a checkpoint without an image tower."""
        if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise ValueError(f"clip_guidance must be a number of at least 0, got {strength!r}")
        if strength and (self.image_encoder is None or self.feature_extractor is None):
            raise ValueError("this checkpoint has no image_encoder and feature_extractor, which clip_guidance needs")

    def _check_image_embeds(self, image_embeds: Tensor, text: TextCondition) -> Tensor:
        """Embeddings instead of the prior's, on the device. Raises ValueError, naming the shape, for others than [B, D]."""
        wanted = [len(text), self.text_proj.config["clip_embeddings_dim"]]
        if list(image_embeds.shape) != wanted:
            raise ValueError(f"image_embeds must be {wanted}, got {list(image_embeds.shape)}")
        return image_embeds.to(self._execution_device, text.embeds.dtype)

    @torch.no_grad()
    def decoder_prediction(self, prompt: list[str], image_embeds: Tensor, styles: list[str] | None = None) -> Predict:
        """The decoder's prediction as in sampling, without guidance, for measuring its error.

        Args:
            prompt: a sentence for each image.
            image_embeds: CLIP image embeddings [B, D].
            styles: the drawing style of each image, ignored by checkpoints without styles; default: none named.

        Returns:
            A function of noised images [B, 3, H, W] and a timestep that returns the decoder's prediction, with twice the
            channels where the variance is learned too. Valid until the pipeline is called again.
        """
        count_prompts(self, prompt)
        self._prepare()
        text = encode_prompt(self, prompt)
        if self.styles:
            numbers = [len(self.styles)] * len(text) if styles is None else [self.styles.index(name) for name in styles]
            text.style = torch.tensor(numbers, device=self._execution_device)
        image_embeds = self._check_image_embeds(image_embeds, text)
        with self._run_stage("decoder", "text_proj", "decoder"):
            predict: Predict = torch.no_grad()(decoder_prediction(self, text, image_embeds, 1.0))
            return predict

    @torch.no_grad()
    def upsample(
        self,
        images: Tensor,
        size: int | None = None,
        generator: Generators = None,
        super_res_num_inference_steps: int | None = None,
        upsampler_1024_num_inference_steps: int | None = None,
    ) -> Tensor:
        """Upsample square images [B, 3, S, S] in [0, 1] to `size`: [B, 3, size, size] in [0, 1].

        S and `size` are among `sizes`. Raises ValueError for others.
        """
        size, side = size or self.sizes[-1], images.shape[-1]
        is_square = images.ndim == 4 and images.shape[1:] == (3, side, side)
        if not is_square or side not in self.sizes[:-1] or size <= side:
            raise ValueError(f"images [B, 3, S, S] with S below {size} and among {self.sizes[:-1]}, got {list(images.shape)}")
        options = CallOptions(self._extent(size, None, None))
        call = self._begin(self._settings(locals()), len(images), 1, generator, options)
        batches: Iterable[Tensor] = [images.to(self._execution_device) * 2 - 1]
        if side == self.sizes[0]:
            batches = upsample_256(self, batches, call)
        batches = upsample_1024(self, batches, call)
        return self._collect(batches, "pt")
