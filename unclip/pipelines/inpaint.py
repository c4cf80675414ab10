"""Inpainting with a text prompt, for any checkpoint (RePaint, arXiv 2201.09865)."""

# B images, H height, W width; a mask is 1 where the image is inpainted

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ..diffusion.sampling import DenoisingOptions, Generators, noise, place_timesteps
from ..io.images import on_white
from ..io.pixels import normalize, to_uint8_tensor
from ..runtime.precision import working_dtype
from .base import Callback, CallOptions, StepCallback
from .call import Call
from .stages import TextCondition, encode_prompt, sample_prior, upsample_256, upsample_1024
from .stages.decoder import decoder_ddim, decoder_prediction, guided_timesteps, no_images
from .stages.text import count_prompts
from .text_to_image import UnCLIPPipeline

REPAINTING_STEPS = 25


class UnCLIPInpaintPipeline(UnCLIPPipeline):
    """Prompt, image and mask -> the image with the mask's white part inpainted; all other pixels are unchanged."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # noqa: PLR0913 - every tool has different arguments
        self,
        prompt: str,
        image: Image.Image,
        mask_image: Image.Image,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int | None = None,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | None = None,
        generator: Generators = None,
        prior_guidance_scale: float | None = None,
        decoder_guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: str | None = None,
        resample: int = 4,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        prior_candidates: int | None = None,
        upsampler_1024_num_inference_steps: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Inpaint the white part of `mask_image`.

        Args:
            prompt: describes the full image.
            image, mask_image: of the same size; both are resized to the output size, which has their proportions
                as nearly as the stages' strides allow, unless `height` and `width` are given.
            decoder_num_inference_steps: 25 by default, evenly spaced, for every checkpoint and sampler.
            resample: how often each step of the decoder is taken, so that the new part fits the known one (the paper's r).

        The other arguments are `UnCLIPPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value, and for a mask of another size, or without a part
                to inpaint, or without one to keep.
        """
        self._check_images(image, mask_image)
        if not isinstance(resample, int) or resample < 1:
            raise ValueError(f"resample must be a whole number of at least 1, got {resample!r}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a str, got {prompt!r}")
        if height is None and width is None:
            height, width = self.sides_like(image, size)
        count = count_prompts(self, prompt)
        if decoder_num_inference_steps is None:
            decoder_num_inference_steps = REPAINTING_STEPS
        settings = self._settings(locals())
        extent = self._extent(size, height, width)
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = CallOptions(extent, output_type, callback)
        call = self._begin(settings, count, num_images_per_prompt, generator, options)
        shape = [side * self.sizes[call.last] // self.sizes[0] for side in (call.height, call.width)]
        known, mask = self._fit(image, mask_image, shape)  # [1, 3, H, W] in [-1, 1], [1, 1, H, W] of 0 and 1

        text = encode_prompt(self, prompt, negative_prompt, num_images_per_prompt)
        image_embeds = sample_prior(self, text, call)
        batches = [_keep(self._inpaint(text, image_embeds, call, known, mask, resample), known, mask)]
        batches = [_keep(images, known, mask) for images in upsample_256(self, batches, call)]
        batches = [_keep(images, known, mask) for images in upsample_1024(self, batches, call)]
        return self._finish(batches, output_type, return_dict)

    def _check_images(self, image: Any, mask_image: Any) -> None:
        """Raises ValueError for anything but PIL images of one size."""
        if not isinstance(image, Image.Image) or not isinstance(mask_image, Image.Image):
            raise ValueError(f"image and mask_image must be PIL images, got {image!r} and {mask_image!r}")
        if image.size != mask_image.size:
            sizes = "{}x{} and {}x{}".format(*image.size, *mask_image.size)
            raise ValueError(f"image and mask_image must have the same size, got {sizes} pixels")

    def _fit(self, image: Image.Image, mask_image: Image.Image, shape: list[int]) -> tuple[Tensor, Tensor]:
        """Image and mask at the output size, where a partly white pixel is inpainted.

        Raises ValueError for a mask of one colour.
        """
        height, width = shape
        fitted = on_white(image).resize((width, height), Image.Resampling.BICUBIC)
        known = normalize(to_uint8_tensor(fitted))[None]
        binary = on_white(mask_image).convert("L").point(lambda v: 255 if v >= 128 else 0)
        white = np.array(binary.resize((width, height), Image.Resampling.BOX)) > 0
        if not white.any() or binary.getextrema() == (255, 255):
            what = "nothing to keep: the mask is white all over" if white.any() else "nothing to repaint: the mask has no white"
            raise ValueError(f"there is {what}")
        if white.all():
            raise ValueError(f"there is nothing to keep: at {width}x{height} pixels some of the mask's white is everywhere")
        mask = torch.from_numpy(white)[None, None].float()
        device, dtype = self._execution_device, working_dtype(self.decoder)
        return known.to(device, dtype), mask.to(device, dtype)

    def _inpaint(
        self, text: TextCondition, image_embeds: Tensor, call: Call, known: Tensor, mask: Tensor, resample: int
    ) -> Tensor:
        """Images [B, 3, h, w] at the decoder's size, equal to `known` where the mask is 0.

        Empty where the call was interrupted before.
        """
        if self.interrupt:
            return no_images(self, call)
        size = (call.height, call.width)
        small = F.adaptive_avg_pool2d(known, size)
        hole = F.adaptive_max_pool2d(mask, size)  # a pixel that is masked in part is inpainted
        scheduler, steps = decoder_ddim(self, clip=True), call.settings.decoder_num_inference_steps
        timesteps: list[int | None] = [*place_timesteps(scheduler, steps).tolist(), None]

        def level(t: int | None) -> Tensor:
            return scheduler.alphas_cumprod[t].to(small.dtype) if t is not None else torch.ones((), dtype=small.dtype)

        def fresh() -> Tensor:
            return noise((len(image_embeds), *small.shape[1:]), call.generator, small.device, small.dtype)

        def insert_known(x: Tensor, outside: Tensor = small) -> Tensor:
            return hole * x + (1 - hole) * outside

        def keep_known(i: int, t: Tensor, x: Tensor, *_: object) -> Tensor:
            alpha = level(timesteps[i + 1])
            return (
                insert_known(x)
                if timesteps[i + 1] is None
                else insert_known(x, alpha.sqrt() * small + (1 - alpha).sqrt() * fresh())
            )

        def renoise(i: int, x: Tensor) -> Tensor:
            step = level(timesteps[i]) / level(timesteps[i + 1])
            return step.sqrt() * x + (1 - step).sqrt() * fresh()

        guidance, start = call.settings.guidance_scale("decoder"), fresh()
        options = DenoisingOptions(
            guidance=guidance,
            interval=guided_timesteps(call, scheduler),
            eta=1.0,
            resample=resample,
            renoise=renoise,
            on_step=keep_known,
            postprocess=insert_known,
        )
        with self._run_stage("decoder", "text_proj", "decoder"):
            predict = decoder_prediction(self, text, image_embeds, guidance, torch.cat([small * (1 - hole), hole], 1))
            images = self._denoise(predict, start, scheduler, steps, call, options)
        return images.clamp(-1, 1)


def _keep(images: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The images, with the known part where the mask is 0; at the mask's size exactly."""
    size = (images.shape[-2], images.shape[-1])
    hole = F.adaptive_max_pool2d(mask, size)
    return hole * images + (1 - hole) * F.adaptive_avg_pool2d(known, size)
