"""Variations of an image, with the interface of diffusers' deprecated `UnCLIPImageVariationPipeline`, up to 1024 px."""

# B images, D embedding dimension, S side of the image tower's input

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from ..diffusion.sampling import Generators
from .base import Callback, CallOptions, StepCallback, UnCLIPBase
from .settings import INVERSION_STEPS, NO_PRIOR
from .stages import decode, encode_image, encode_prompt, upsample_256, upsample_1024
from .stages.decoder import decoder_ddim, invert
from .stages.image import decoder_images

Images = Image.Image | list[Image.Image] | Tensor


class UnCLIPImageVariationPipeline(UnCLIPBase):
    """Image -> image embedding -> 64 px -> 256 px -> 1024 px: samples that share the image's embedding (paper, section 3.1)."""

    model_cpu_offload_seq = (
        "text_encoder->image_encoder->text_proj->decoder->"  # type: ignore[assignment]  # DiffusionPipeline declares None
        "super_res_first->super_res_last->upsampler_1024"
    )
    _optional_components = [
        "image_encoder",
        "feature_extractor",
        "super_res_last",
        "upsampler_1024",
        "upsampler_1024_scheduler",
    ]

    def __init__(  # noqa: PLR0913 - a component each, as in diffusers
        self,
        decoder: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        text_proj: nn.Module,
        feature_extractor: Any,
        image_encoder: nn.Module | None,
        super_res_first: nn.Module,
        super_res_last: nn.Module | None,
        decoder_scheduler: Any,
        super_res_scheduler: Any,
        upsampler_1024: nn.Module | None = None,
        upsampler_1024_scheduler: Any = None,
        defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._register(
            defaults,
            decoder=decoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_proj=text_proj,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            decoder_scheduler=decoder_scheduler,
            super_res_scheduler=super_res_scheduler,
            upsampler_1024=upsampler_1024,
            upsampler_1024_scheduler=upsampler_1024_scheduler,
        )

    @torch.no_grad()
    def __call__(  # noqa: PLR0913 - diffusers' interface
        self,
        image: Images | None = None,
        num_images_per_prompt: int = 1,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | None = None,
        generator: Generators = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        decoder_guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        eta: float | None = None,
        decoder_guidance_interval: tuple[float, float] | None = None,
        decoder_timestep_shift: float | None = None,
        sampler: str | None = None,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        upsampler_1024_num_inference_steps: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample `num_images_per_prompt` variations of each image.

        Args:
            image: PIL images, or an output [B, 3, S, S] of `feature_extractor`; may be None when `image_embeddings` [B, D] are
                given, which take precedence.
            prompt: a text condition, one for all images or one for each; default: none.
            decoder_guidance_interval, decoder_timestep_shift, sampler: as `UnCLIPPipeline`'s; with `eta` it is always DDIM.
            eta: None samples from fresh noise. Otherwise the image is first inverted by DDIM (paper, section 3), and sampled
                from its noise with this share of fresh noise at every step: 0 reconstructs the image, 1 varies most. Then 50
                decoder steps and no guidance are the defaults, because guidance changes the image too.

        The other arguments are `UnCLIPPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value, and for an image without an `image_encoder`.
        """
        count = self._count_images(image, image_embeddings)
        if eta is not None:
            self._check_eta(eta, sampler, image, count, decoder_latents)
            if decoder_num_inference_steps is None:
                decoder_num_inference_steps = INVERSION_STEPS
            decoder_guidance_scale = 1.0 if decoder_guidance_scale is None else decoder_guidance_scale
        settings = self._settings(locals() | NO_PRIOR, sampler)
        extent, images = self._extent(size, height, width), num_images_per_prompt
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        call = self._begin(settings, count, images, generator, CallOptions(extent, output_type, callback, sampler))
        self._check_super_res_latents(call, super_res_latents)
        if negative_prompt and settings.guidance_scale("decoder") == 1:
            raise ValueError(f"guidance leads away from negative_prompt {negative_prompt!r}, and there is none here")

        image_embeds = self._embeddings(image, image_embeddings)
        text = encode_prompt(self, "" if prompt is None else prompt, negative_prompt, count=count)
        if eta is not None:
            decoder_latents = invert(self, decoder_images(pil_images(image), call), text, image_embeds, call)
            decoder_latents = decoder_latents.repeat_interleave(images, 0)
            call.scheduler, call.eta = decoder_ddim(self), eta
        image_embeds, text = image_embeds.repeat_interleave(images, 0), text.repeated(images)
        batches = decode(self, text, image_embeds, call, decoder_latents)
        batches = upsample_256(self, batches, call, super_res_latents)
        batches = upsample_1024(self, batches, call)
        return self._finish(batches, output_type, return_dict)

    def _embeddings(self, image: Images | None, image_embeddings: Tensor | None) -> Tensor:
        """The image embeddings [B, D]: those given, else those of the images."""
        if image_embeddings is not None:
            return image_embeddings.to(self._execution_device)
        if image is None:
            raise ValueError("give image or image_embeddings")
        return encode_image(self, image)

    def _check_eta(self, eta: float, sampler: str | None, image: Any, count: int, decoder_latents: Tensor | None) -> None:
        """Raises ValueError for an eta out of range, and for arguments that exclude inverting the image."""
        if not isinstance(eta, int | float) or not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {eta!r}")
        if sampler not in (None, "ddim"):
            raise ValueError(f"eta inverts the image by DDIM: sampler must be None or 'ddim', got {sampler!r}")
        if (images := len(pil_images(image))) != count:
            raise ValueError(f"image and image_embeddings must be as many, got {images} and {count}")
        if decoder_latents is not None:
            raise ValueError("eta draws from the image's own noise: give eta or decoder_latents")

    def _count_images(self, image: Any, image_embeddings: Tensor | None) -> int:
        """The number of images. Raises ValueError, naming it, for anything else."""
        if image_embeddings is not None:
            dim = self.text_proj.config["clip_embeddings_dim"]
            if image_embeddings.ndim != 2 or image_embeddings.shape[1] != dim:
                raise ValueError(f"image_embeddings must be [B, {dim}], got {list(image_embeddings.shape)}")
            return len(image_embeddings)
        if self.image_encoder is None or (self.feature_extractor is None and not isinstance(image, Tensor)):
            raise ValueError("this checkpoint has no image_encoder and feature_extractor: give image_embeddings instead")
        if isinstance(image, Image.Image):
            return 1
        if isinstance(image, Tensor):
            if image.ndim != 4 or image.shape[1] != 3:
                raise ValueError(f"image must be [B, 3, S, S], got {list(image.shape)}")
            return len(image)
        if not isinstance(image, list) or not image or not all(isinstance(i, Image.Image) for i in image):
            raise ValueError(f"image must be a PIL image, a non-empty list of them or a tensor, got {image!r}")
        return len(image)


def pil_images(image: Images | None) -> list[Image.Image]:
    """PIL images as a list. Raises ValueError for a tensor or None."""
    if image is None or isinstance(image, Tensor):
        raise ValueError("eta needs the image itself: give image as a PIL image or a list of them")
    return [image] if isinstance(image, Image.Image) else image
