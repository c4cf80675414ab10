"""Variations of a picture, called as diffusers' deprecated `UnCLIPImageVariationPipeline` and going on to 1024 px."""

# B pictures, D embedding dimension

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from ..sampling import Generators
from .base import Callback, TextCondition, UnCLIPBase


class UnCLIPImageVariationPipeline(UnCLIPBase):
    """Picture -> image embedding -> 64 px -> 256 px -> 1024 px: what the embedding holds is kept, the rest drawn anew
    (paper, section 3.1).
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->text_proj->decoder->super_res_first->super_res_last->upsampler_1024"
    _optional_components = [
        "image_encoder",
        "feature_extractor",
        "super_res_last",
        "upsampler_1024",
        "upsampler_1024_scheduler",
    ]

    def __init__(
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
        defaults: dict | None = None,
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
    def __call__(
        self,
        image: Image.Image | list[Image.Image] | Tensor | None = None,
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
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        upsampler_1024_num_inference_steps: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images_per_prompt` variations of each picture.

        Args:
            image: PIL pictures, or a tensor [B, 3, S, S] that is normalised and sized as `feature_extractor` does it; may be
                None when `image_embeddings` [B, D] are given, which go before it.

        The other arguments are `UnCLIPPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value, and for a picture without an `image_encoder`.
        """
        count = self._count_images(image, image_embeddings)
        given = {
            "decoder_num_inference_steps": decoder_num_inference_steps,
            "super_res_num_inference_steps": super_res_num_inference_steps,
            "upsampler_1024_num_inference_steps": upsampler_1024_num_inference_steps,
            "decoder_guidance_scale": decoder_guidance_scale,
        }
        images, inputs = num_images_per_prompt, callback_on_step_end_tensor_inputs
        call = self._begin(count, images, given, generator, size, height, width, output_type, callback_on_step_end, inputs)

        embedding = self._encode_image(image, image_embeddings).repeat_interleave(images, 0)
        empty = [e.expand(len(embedding), *e.shape[1:]) for e in self._run_text_encoder([""])]
        picture = self._draw_picture(TextCondition(*empty, *empty), embedding, call, decoder_latents)
        if call.last >= 1:
            picture = self._upsample(picture, call, super_res_latents)
        if call.last >= 2:
            picture = self._upsample_1024(picture, call)

        self.maybe_free_model_hooks()
        images = self._output(picture, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _count_images(self, image: Any, image_embeddings: Tensor | None) -> int:
        """How many pictures there are. Raises ValueError, naming it, for what is none."""
        if image_embeddings is not None:
            dim = self.text_proj.config.clip_embeddings_dim
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
            raise ValueError(f"image must be a PIL picture, a non-empty list of them or a tensor, got {image!r}")
        return len(image)

    def _encode_image(self, image: Any, image_embeddings: Tensor | None) -> Tensor:
        """Image embeddings [B, D]."""
        if image_embeddings is not None:
            return image_embeddings.to(self._execution_device)
        if not isinstance(image, Tensor):
            image = self.feature_extractor(images=image, return_tensors="pt").pixel_values
        return self.image_encoder(image.to(self._execution_device, self.image_encoder.dtype)).image_embeds
