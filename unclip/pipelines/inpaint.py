"""Repainting a part of an image by a sentence, with any checkpoint (RePaint, arXiv 2201.09865)."""

# B images, H height, W width; a mask is 1 where the image is repainted

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ..diffusion.sampling import DenoisingOptions, Generators, noise, place_timesteps
from ..io.images import on_white
from ..io.pixels import normalize, to_uint8_tensor
from ..runtime.precision import working_dtype
from .base import Callback, StepCallback
from .call import Call
from .stages import TextCondition, encode_prompt, sample_prior, upsample_256, upsample_1024
from .stages.decoder import decoder_ddim, decoder_prediction, guided_timesteps, no_images
from .stages.text import count_prompts
from .text_to_image import UnCLIPPipeline

REPAINTING_STEPS = 25


class UnCLIPInpaintPipeline(UnCLIPPipeline):
    """Prompt, image and mask -> the image with the mask's white part drawn anew; the rest is kept to the pixel."""

    @torch.no_grad()
    def __call__(
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
    ) -> ImagePipelineOutput | tuple:
        """Draw the white part of `mask_image` anew.

        Args:
            prompt: what the whole image should show.
            image, mask_image: of the same size; both are fitted to the size that is drawn, which has their proportions
                as nearly as the stages' strides allow, unless `height` and `width` say otherwise.
            decoder_num_inference_steps: 25 by default, evenly spaced, whatever the checkpoint takes with its own sampler.
            resample: how often each step of the decoder is taken, so that the new part grows into the old one (the paper's r).

        The other arguments are `UnCLIPPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value, and for a mask of another size, or without a part
                to repaint, or without one to keep.
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
        call = self._begin(settings, count, num_images_per_prompt, generator, extent, output_type, callback)
        shape = [side * self.sizes[call.last] // self.sizes[0] for side in (call.height, call.width)]
        known, mask = self._fit(image, mask_image, shape)  # [1, 3, H, W] in [-1, 1], [1, 1, H, W] of 0 and 1

        text = encode_prompt(self, prompt, negative_prompt, num_images_per_prompt)
        image_embeds = sample_prior(self, text, call)
        batches = [_keep(self._repaint(text, image_embeds, call, known, mask, resample), known, mask)]
        batches = [_keep(images, known, mask) for images in upsample_256(self, batches, call)]
        batches = [_keep(images, known, mask) for images in upsample_1024(self, batches, call)]
        return self._finish(batches, output_type, return_dict)

    def _check_images(self, image: Any, mask_image: Any) -> None:
        """Raises ValueError for what are no PIL images, and for images of different sizes."""
        if not isinstance(image, Image.Image) or not isinstance(mask_image, Image.Image):
            raise ValueError(f"image and mask_image must be PIL images, got {image!r} and {mask_image!r}")
        if image.size != mask_image.size:
            sizes = "{}x{} and {}x{}".format(*image.size, *mask_image.size)
            raise ValueError(f"image and mask_image must have the same size, got {sizes} pixels")

    def _fit(self, image: Image.Image, mask_image: Image.Image, shape: list[int]) -> tuple[Tensor, Tensor]:
        """Image and mask at the size that is drawn, where a pixel that is white in part is repainted.

        Raises ValueError for a mask that is of one colour.
        """
        height, width = shape
        fitted = on_white(image).resize((width, height), Image.Resampling.BICUBIC)
        known = normalize(to_uint8_tensor(fitted))[None]
        whole = on_white(mask_image).convert("L").point(lambda v: 255 if v >= 128 else 0)
        white = np.array(whole.resize((width, height), Image.Resampling.BOX)) > 0
        if not white.any() or whole.getextrema()[0] == 255:
            what = "nothing to keep: the mask is white all over" if white.any() else "nothing to repaint: the mask has no white"
            raise ValueError(f"there is {what}")
        if white.all():
            raise ValueError(f"there is nothing to keep: at {width}x{height} pixels some of the mask's white is everywhere")
        mask = torch.from_numpy(white)[None, None].float()
        device, dtype = self._execution_device, working_dtype(self.decoder)
        return known.to(device, dtype), mask.to(device, dtype)

    def _repaint(
        self, text: TextCondition, image_embeds: Tensor, call: Call, known: Tensor, mask: Tensor, resample: int
    ) -> Tensor:
        """Images [B, 3, h, w] at the decoder's size: known where the mask is 0, drawn to fit it where it is 1.

        None of them where the call was interrupted before.
        """
        if self.interrupt:
            return no_images(self, call)
        size = (call.height, call.width)
        small = F.adaptive_avg_pool2d(known, size)
        hole = F.adaptive_max_pool2d(mask, size)  # a pixel that is to be repainted in part is repainted
        scheduler, steps = decoder_ddim(self, clip=True), call.settings.decoder_num_inference_steps
        timesteps = [*place_timesteps(scheduler, steps).tolist(), None]

        def level(t: int | None) -> Tensor:
            return scheduler.alphas_cumprod[t].to(small.dtype) if t is not None else torch.ones((), dtype=small.dtype)

        def fresh() -> Tensor:
            return noise((len(image_embeds), *small.shape[1:]), call.generator, small.device, small.dtype)

        def around(x: Tensor, outside: Tensor = small) -> Tensor:
            return hole * x + (1 - hole) * outside

        def keep(i: int, t: Tensor, x: Tensor, *_: object) -> Tensor:
            alpha = level(timesteps[i + 1])
            return around(x) if timesteps[i + 1] is None else around(x, alpha.sqrt() * small + (1 - alpha).sqrt() * fresh())

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
            on_step=keep,
            postprocess=around,
        )
        with self._run_stage("decoder", "text_proj", "decoder"):
            predict = decoder_prediction(self, text, image_embeds, guidance, torch.cat([small * (1 - hole), hole], 1))
            images = self._denoise(predict, start, scheduler, steps, call, options)
        return images.clamp(-1, 1)


def _keep(images: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The known part in the images' place where the mask is 0; at the mask's own size to the pixel."""
    size = images.shape[-2:]
    hole = F.adaptive_max_pool2d(mask, size)
    return hole * images + (1 - hole) * F.adaptive_avg_pool2d(known, size)
