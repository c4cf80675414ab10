"""Interpolation between images and texts along great circles of CLIP's space (paper, section 3.2), and text diffs."""

# P points of the path, D embedding dimension

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ..diffusion.latents import slerp, spherical_mean
from ..runtime.precision import working_dtype
from .base import Callback, CallOptions, StepCallback
from .call import Call, fresh_generator
from .settings import INVERSION_STEPS, NO_PRIOR, images_at_once
from .stages import decode, encode_image, encode_prompt, sample_prior, upsample_256, upsample_1024
from .stages.decoder import decoder_ddim, invert, no_images
from .stages.image import decoder_images
from .stages.text import encode_texts
from .text_to_image import UnCLIPPipeline

MODES = ("fixed", "interpolated")


class UnCLIPInterpolationPipeline(UnCLIPPipeline):
    """Images between two or more ends, each an image or a sentence.

    The embedding of a sentence is sampled from the prior. The decoder is conditioned on the empty prompt.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # noqa: PLR0913 - every tool has different arguments
        self,
        ends: Sequence[str | Image.Image],
        steps: int = 9,
        weights: Sequence[Sequence[float]] | None = None,
        noise: str = "fixed",
        prior_num_inference_steps: int | None = None,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        prior_guidance_scale: float | None = None,
        decoder_guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        prior_candidates: int | None = None,
        upsampler_1024_num_inference_steps: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample the path from the first end to the second, or the mixtures of `weights`.

        Args:
            ends: two ends, or any number of them with `weights`: PIL images and sentences.
            steps: images of the path, with its ends. Many are sampled in batches; a callback is called for each batch's steps.
            weights: instead of a path, for each image one weight for each end: the mean on the sphere.
            decoder_num_inference_steps, decoder_guidance_scale: with interpolated noise 50 and 1 by default, as images are
                inverted by DDIM then.
            noise: "fixed" samples every image from the same noise; "interpolated" interpolates between the ends' noise: that of
                an image by DDIM inversion (then without guidance), fresh noise for a sentence.
            generator: one generator for the path, with the same noise for every image.

        Raises:
            ValueError: for an argument out of range, naming its value.
        """
        if noise == "interpolated":
            decoder_guidance_scale = 1.0 if decoder_guidance_scale is None else decoder_guidance_scale
            if decoder_num_inference_steps is None:
                decoder_num_inference_steps = INVERSION_STEPS
        self._check_ends(ends, steps, weights, noise, generator)
        count = steps if weights is None else len(weights)
        settings = self._settings(locals())
        extent = self._extent(size, height, width)
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = CallOptions(extent, output_type, callback)
        call = self._begin(settings, count, 1, generator or fresh_generator(), options)

        found = [self._end(end, call) for end in ends if not self.interrupt]
        if self.interrupt:
            return self._finish([no_images(self, call)], output_type, return_dict)
        points = torch.cat(found)  # [ends, D]
        image_embeds = self._between(points, steps, weights)  # [P, D]
        text = encode_prompt(self, "", count=count)
        start = self._noises(ends, points, count, noise, call)
        if noise == "interpolated":
            call.scheduler = decoder_ddim(self)
        call = call.with_same_noise(count, images_at_once(self.sizes[call.last]))
        images = decode(self, text, image_embeds, call, start)
        images = upsample_256(self, images, call)
        images = upsample_1024(self, images, call)
        return self._finish(images, output_type, return_dict)

    def _check_ends(self, ends: Any, steps: Any, weights: Any, noise: Any, generator: Any) -> None:
        kinds = (str, Image.Image)
        if not isinstance(ends, list | tuple) or len(ends) < 2 or not all(isinstance(e, kinds) for e in ends):
            raise ValueError(f"ends must be two or more sentences and PIL images, got {ends!r}")
        if any(isinstance(e, str) and not e.strip() for e in ends):
            raise ValueError("an end is an empty sentence")
        if weights is None and (len(ends) != 2 or not isinstance(steps, int) or steps < 2):
            raise ValueError(f"a path has two ends and at least 2 steps, got {len(ends)} ends and {steps!r} steps")
        if weights is not None and not len(weights):
            raise ValueError(f"weights must name at least one mixture, got {weights!r}")
        if noise not in MODES or (noise == "interpolated" and weights is not None):
            raise ValueError(f"noise must be fixed, or interpolated on a path, got {noise!r}")
        if isinstance(generator, list):
            raise ValueError("a path has one generator, not a list of them")
        images = any(isinstance(e, Image.Image) for e in ends)
        if images and (self.image_encoder is None or self.feature_extractor is None):
            raise ValueError("this checkpoint has no image_encoder and feature_extractor, which images need")

    def _end(self, end: str | Image.Image, call: Call) -> Tensor:
        """An end's image embedding [1, D]."""
        if isinstance(end, Image.Image):
            image_embeds = encode_image(self, end)
        else:
            image_embeds = sample_prior(self, encode_prompt(self, end), call)
        return image_embeds.to(working_dtype(self.decoder))

    def _between(self, points: Tensor, steps: int, weights: Sequence[Sequence[float]] | None) -> Tensor:
        """The embeddings [P, D] of the path or of the mixtures, with the (weighted) mean length of the ends."""
        if weights is None:
            shares = torch.linspace(0, 1, steps, dtype=points.dtype, device=points.device)
            return slerp(points[:1].expand(steps, -1), points[1:].expand(steps, -1), shares)
        lengths = points.norm(dim=-1)
        mixed = []
        for row in weights:
            share = torch.as_tensor(row, dtype=points.dtype, device=points.device)
            direction = spherical_mean(points, share)
            mixed.append(direction * (share / share.sum() * lengths).sum())
        return torch.stack(mixed)

    def _noises(self, ends: Sequence[str | Image.Image], points: Tensor, count: int, mode: str, call: Call) -> Tensor:
        """Each image's starting noise [P, 3, H, W]."""
        shape = (1, 3, call.height, call.width)
        if mode == "fixed":
            return self._starting_noise(shape, self.decoder, call.generator, None).expand(count, -1, -1, -1)
        starts = []
        for end, point in zip(ends, points, strict=True):
            if isinstance(end, Image.Image):
                starts.append(invert(self, decoder_images(end, call), encode_prompt(self, ""), point[None], call))
            else:
                starts.append(self._starting_noise(shape, self.decoder, call.generator, None))
        shares = torch.linspace(0, 1, count, dtype=starts[0].dtype, device=starts[0].device)
        first, second = (s.flatten(1).expand(count, -1) for s in starts)
        return slerp(first, second, shares).unflatten(1, shape[1:])


class UnCLIPTextDiffPipeline(UnCLIPInterpolationPipeline):
    """Text diffs: an image changed by the difference of two texts (paper, section 3.3)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # noqa: PLR0913 - every tool has different arguments
        self,
        image: Image.Image,
        target: str,
        source: str = "",
        strength: float | Sequence[float] = (0.25, 0.5),
        decoder_num_inference_steps: int = INVERSION_STEPS,
        super_res_num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        decoder_guidance_scale: float = 1.0,
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
        """Sample the image at each strength, with its embedding rotated by that share to the texts' difference.

        Args:
            image: the image; it is inverted by DDIM, so that strength 0 reconstructs it.
            target: describes the changed image.
            source: describes the image (default: the empty text, the paper's other baseline).
            strength: shares of the great circle from the image's embedding to the normalised difference of the texts'
                embeddings; the paper uses 0.25 to 0.5.

        Raises:
            ValueError: for an argument out of range, naming its value.
        """
        strengths = [strength] if isinstance(strength, int | float) else list(strength)
        if not strengths or not all(isinstance(s, int | float) and 0 <= s <= 1 for s in strengths):
            raise ValueError(f"strength must be from 0 to 1, got {strength!r}")
        if not isinstance(target, str) or not target.strip() or not isinstance(source, str):
            raise ValueError(f"target and source must be sentences, got {target!r} and {source!r}")
        if target == source:
            raise ValueError(f"target and source are the same sentence, {target!r}: there is no difference to follow")
        if not isinstance(image, Image.Image):
            raise ValueError(f"image must be a PIL image, got {image!r}")
        self._check_ends([image, target], 2, None, "fixed", generator)
        settings, count = self._settings(locals() | NO_PRIOR), len(strengths)
        extent = self._extent(size, height, width)
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = CallOptions(extent, output_type, callback)
        call = self._begin(settings, count, 1, generator or fresh_generator(), options)

        point = self._end(image, call)  # [1, D]
        texts = encode_texts(self, [source, target])[0].to(point.dtype)
        difference = texts[1:] - texts[:1]
        if not difference.norm() > 1e-6 * texts.norm():
            raise ValueError(f"to CLIP {source!r} and {target!r} are the same: there is no difference to follow")
        difference = difference / difference.norm() * point.norm()
        shares = torch.tensor(strengths, dtype=point.dtype, device=point.device)
        image_embeds = slerp(point.expand(count, -1), difference.expand(count, -1), shares)
        empty = encode_prompt(self, "")
        start = invert(self, decoder_images(image, call), empty, point, call).expand(count, -1, -1, -1)
        call.scheduler = decoder_ddim(self)
        call = call.with_same_noise(count, images_at_once(self.sizes[call.last]))
        images = decode(self, empty.repeated(count), image_embeds, call, start)
        images = upsample_256(self, images, call)
        images = upsample_1024(self, images, call)
        return self._finish(images, output_type, return_dict)
