"""What a picture's embedding holds in its first principal components (paper, section 3.4 and figure 7)."""

# K numbers of components, D embedding dimension

from collections.abc import Sequence

import torch
from diffusers import ImagePipelineOutput
from PIL import Image

from ..diffusion.latents import PrincipalAxes
from .base import Callback, fresh_generator
from .image_variation import UnCLIPImageVariationPipeline

COUNTS = (0, 5, 10, 20, 40, 80, 160, 320)


class UnCLIPPCAPipeline(UnCLIPImageVariationPipeline):
    """Picture -> its embedding cut to ever more principal components -> the pictures that those say."""

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image,
        axes: PrincipalAxes,
        counts: Sequence[int] = COUNTS,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
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
        """Draw what the mean and the first `counts[n]` components of the picture's embedding say, from the same noise.

        Args:
            image: one PIL picture.
            axes: the principal axes of the CLIP's embeddings of many pictures.
            counts: for each picture that is drawn, how many components are kept: 0 is the mean of all pictures, and all of
                them give the whole embedding back.

        The other arguments are `UnCLIPImageVariationPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value, and for axes of another CLIP.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(f"image must be one PIL picture, got {image!r}")
        self._count_images(image, None)
        dim = self.text_proj.config.clip_embeddings_dim
        if axes.axes.shape[1] != dim:
            raise ValueError(f"the axes are of {axes.axes.shape[1]} dimensions, this model's embeddings of {dim}")
        own = getattr(self.image_encoder.config, "clip_fingerprint", None)
        if own and axes.clip_fingerprint and own != axes.clip_fingerprint:
            raise ValueError(f"the axes are of the CLIP {axes.clip_fingerprint}, this model has the CLIP {own}")
        if not counts or not all(isinstance(k, int) and not isinstance(k, bool) for k in counts):
            raise ValueError(f"counts must be whole numbers, got {counts!r}")
        given = {
            "decoder_num_inference_steps": decoder_num_inference_steps,
            "super_res_num_inference_steps": super_res_num_inference_steps,
            "upsampler_1024_num_inference_steps": upsampler_1024_num_inference_steps,
            "decoder_guidance_scale": decoder_guidance_scale,
        }
        generator = generator or fresh_generator()
        inputs, count = callback_on_step_end_tensor_inputs, len(counts)
        call = self._begin(count, 1, given, generator, size, height, width, output_type, callback_on_step_end, inputs)
        whole = self._encode_image(image)  # [1, D]
        embedding = torch.cat([axes.first(whole, k) for k in counts])  # [K, D]
        text = self._encode_prompt("", None, 1, None, None, count)
        call = self._alike(call, count)
        picture = self._draw_picture(text, embedding, call, None)
        return self._finish(picture, call, None, output_type, return_dict)
