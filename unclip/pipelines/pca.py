"""Images from the first principal components of an image embedding (paper, section 3.4 and figure 7)."""

# K numbers of components, D embedding dimension

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from ..diffusion.latents import PrincipalAxes
from .base import Callback, CallOptions, StepCallback
from .call import fresh_generator
from .image_variation import UnCLIPImageVariationPipeline
from .settings import NO_PRIOR, images_at_once
from .stages import decode, encode_image, encode_prompt, upsample_256, upsample_1024

COUNTS = (0, 5, 10, 20, 40, 80, 160, 320)


class UnCLIPPCAPipeline(UnCLIPImageVariationPipeline):
    """Image -> projections of its embedding onto more and more principal components -> images."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # noqa: PLR0913 - every tool has different arguments
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
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample the image's embedding projected onto the first `counts[n]` components, all from the same noise.

        Args:
            image: one PIL image.
            axes: the principal axes of the CLIP's embeddings of many images.
            counts: for each sample the number of components: 0 is the mean of all images, and all of them reconstruct the
                embedding.

        The other arguments are `UnCLIPImageVariationPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value, and for axes of another CLIP.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(f"image must be one PIL image, got {image!r}")
        self._count_images(image, None)
        dim = self.text_proj.config["clip_embeddings_dim"]
        if axes.axes.shape[1] != dim:
            raise ValueError(f"the axes are of {axes.axes.shape[1]} dimensions, this model's embeddings of {dim}")
        fingerprint = getattr(getattr(self.image_encoder, "config", None), "clip_fingerprint", None)
        if fingerprint and axes.clip_fingerprint and fingerprint != axes.clip_fingerprint:
            raise ValueError(f"the axes are of the CLIP {axes.clip_fingerprint}, this model has the CLIP {fingerprint}")
        if not counts or not all(isinstance(k, int) and not isinstance(k, bool) for k in counts):
            raise ValueError(f"counts must be whole numbers, got {counts!r}")
        settings = self._settings(locals() | NO_PRIOR)
        count, extent = len(counts), self._extent(size, height, width)
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = CallOptions(extent, output_type, callback)
        call = self._begin(settings, count, 1, generator or fresh_generator(), options)

        full = encode_image(self, image)  # [1, D]
        image_embeds = torch.cat([axes.first(full, k) for k in counts])  # [K, D]
        text = encode_prompt(self, "", count=count)
        call = call.with_same_noise(count, images_at_once(self.sizes[call.last]))
        images = decode(self, text, image_embeds, call)
        images = upsample_256(self, images, call)
        images = upsample_1024(self, images, call)
        return self._finish(images, output_type, return_dict)
