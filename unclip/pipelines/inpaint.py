"""Repainting a part of a picture by a sentence, with any checkpoint (RePaint, arXiv 2201.09865)."""

# B pictures, H height, W width; a mask is 1 where the picture is repainted

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ..diffusion.sampling import Generators, noise, place_timesteps
from ..io.images import on_white
from ..runtime.precision import working_dtype
from .base import Call, Callback
from .text_to_image import UnCLIPPipeline

REPAINTING_STEPS = 25


class UnCLIPInpaintPipeline(UnCLIPPipeline):
    """Prompt, picture and mask -> the picture with the mask's white part drawn anew; the rest is kept to the pixel."""

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
            prompt: what the whole picture should show.
            image, mask_image: of the same size; both are fitted to the size that is drawn, which has their proportions
                as nearly as the stages' strides allow, unless `height` and `width` say otherwise.
            decoder_num_inference_steps: 25 by default, evenly spaced, whatever the checkpoint takes with its own sampler.
            resample: how often each step of the decoder is taken, so that the new part grows into the old one (the paper's r).

        The other arguments are `UnCLIPPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value, and for a mask of another size, or without a part
                to repaint, or without one to keep.
        """
        if not isinstance(image, Image.Image) or not isinstance(mask_image, Image.Image):
            raise ValueError(f"image and mask_image must be PIL pictures, got {image!r} and {mask_image!r}")
        if image.size != mask_image.size:
            sizes = "{}x{} and {}x{}".format(*image.size, *mask_image.size)
            raise ValueError(f"image and mask_image must have the same size, got {sizes} pixels")
        if not isinstance(resample, int) or resample < 1:
            raise ValueError(f"resample must be a whole number of at least 1, got {resample!r}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a str, got {prompt!r}")
        if height is None and width is None:
            height, width = self.sides_like(image, size)
        count = self._count_prompts(prompt, None, None)
        images, inputs = num_images_per_prompt, callback_on_step_end_tensor_inputs
        steps = REPAINTING_STEPS if decoder_num_inference_steps is None else decoder_num_inference_steps
        given = {
            "prior_num_inference_steps": prior_num_inference_steps,
            "decoder_num_inference_steps": steps,
            "super_res_num_inference_steps": super_res_num_inference_steps,
            "upsampler_1024_num_inference_steps": upsampler_1024_num_inference_steps,
            "prior_guidance_scale": prior_guidance_scale,
            "decoder_guidance_scale": decoder_guidance_scale,
            "prior_candidates": prior_candidates,
        }
        call = self._begin(count, images, given, generator, size, height, width, output_type, callback_on_step_end, inputs)
        shape = [side * self.sizes[call.last] // self.sizes[0] for side in (call.height, call.width)]
        known, mask = self._fitted(image, mask_image, shape)  # [1, 3, H, W] in [-1, 1], [1, 1, H, W] of 0 and 1

        text = self._encode_prompt(prompt, negative_prompt, images, None, None)
        embedding = self._draw_embedding(text, call, None)
        picture = _keep(self._repaint(text, embedding, call, known, mask, resample), known, mask)
        if call.last >= 1:
            picture = _keep(self._upsample(picture, call, None), known, mask)
        if call.last >= 2:
            picture = _keep(self._upsample_1024(picture, call), known, mask)

        self.maybe_free_model_hooks()
        images = self._output(picture, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _fitted(self, image: Image.Image, mask_image: Image.Image, shape: list[int]) -> tuple[Tensor, Tensor]:
        """Picture and mask at the size that is drawn, where a pixel that is white in part is repainted.

        Raises ValueError for a mask that is of one colour.
        """
        height, width = shape
        pixels = np.array(on_white(image).resize((width, height), Image.Resampling.BICUBIC))
        known = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
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

    def _repaint(self, text, embedding: Tensor, call: Call, known: Tensor, mask: Tensor, resample: int) -> Tensor:
        """Pictures [B, 3, h, w] at the decoder's size: known where the mask is 0, drawn to fit it where it is 1.

        None of them where the call was interrupted before.
        """
        if self.interrupt:
            return self._no_pictures(call)
        size = (call.height, call.width)
        small = F.adaptive_avg_pool2d(known, size)
        hole = F.adaptive_max_pool2d(mask, size)  # a pixel that is to be repainted in part is repainted
        scheduler, steps = self._ddim(clip=True), call.settings["decoder_num_inference_steps"]
        timesteps = [*place_timesteps(scheduler, steps).tolist(), None]

        def level(t: int | None) -> Tensor:
            return scheduler.alphas_cumprod[t].to(small.dtype) if t is not None else torch.ones((), dtype=small.dtype)

        def fresh() -> Tensor:
            return noise((len(embedding), *small.shape[1:]), call.generator, small.device, small.dtype)

        def around(x: Tensor, outside: Tensor = small) -> Tensor:
            return hole * x + (1 - hole) * outside

        def keep(i: int, t: Tensor, x: Tensor, *_: object) -> Tensor:
            alpha = level(timesteps[i + 1])
            return around(x) if timesteps[i + 1] is None else around(x, alpha.sqrt() * small + (1 - alpha).sqrt() * fresh())

        def renoise(i: int, x: Tensor) -> Tensor:
            step = level(timesteps[i]) / level(timesteps[i + 1])
            return step.sqrt() * x + (1 - step).sqrt() * fresh()

        guidance = call.guidance("decoder")
        start, more = fresh(), {"on_step": keep, "finished": around, "resample": resample, "renoise": renoise}
        more["interval"] = self._guided_timesteps(call, scheduler)
        with self._working("decoder", "text_proj", "decoder"):
            predict = self._decoder_prediction(text, embedding, guidance, torch.cat([small * (1 - hole), hole], 1))
            return self._denoise(predict, start, scheduler, steps, call, guidance, 1.0, **more).clamp(-1, 1)


def _keep(picture: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The known part in the picture's place where the mask is 0; at the mask's own size to the pixel."""
    size = picture.shape[-2:]
    hole = F.adaptive_max_pool2d(mask, size)
    return hole * picture + (1 - hole) * F.adaptive_avg_pool2d(known, size)
