"""Between pictures and sentences: great circles through CLIP's space (paper, section 3.2)."""

# P points of the path, D embedding dimension

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ..diffusion.latents import slerp, spherical_mean
from ..runtime.precision import working_dtype
from .base import INVERSION_STEPS, Callback, fresh_generator
from .text_to_image import UnCLIPPipeline

MODES = ("fixed", "interpolated")


class UnCLIPInterpolationPipeline(UnCLIPPipeline):
    """Pictures between two or more ends, each a picture or a sentence.

    A sentence's end is the embedding that the prior draws for it; a picture's is its own. The decoder hears no text.
    """

    @torch.no_grad()
    def __call__(
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
    ) -> ImagePipelineOutput | tuple:
        """Draw the path from the first end to the second, or the mixtures that `weights` name.

        Args:
            ends: two ends, or any number of them with `weights`: PIL pictures and sentences.
            steps: pictures of the path, its ends among them. Many are drawn in batches; a callback hears of each batch's steps.
            weights: instead of a path, for each picture one weight for each end: the mean on the sphere.
            decoder_num_inference_steps, decoder_guidance_scale: with interpolated noise 50 and 1 by default, as pictures are
                inverted by DDIM then.
            noise: "fixed" draws every picture from the same noise; "interpolated" goes from the first end's noise to the
                second's, too: a picture's own (by DDIM inversion, then without guidance), or fresh noise for a sentence.
            generator: one generator for the whole path; every picture hears the same noise from it.

        Raises:
            ValueError: for an argument out of range, naming its value.
        """
        given = {
            "prior_num_inference_steps": prior_num_inference_steps,
            "decoder_num_inference_steps": decoder_num_inference_steps,
            "super_res_num_inference_steps": super_res_num_inference_steps,
            "upsampler_1024_num_inference_steps": upsampler_1024_num_inference_steps,
            "prior_guidance_scale": prior_guidance_scale,
            "decoder_guidance_scale": decoder_guidance_scale,
            "prior_candidates": prior_candidates,
        }
        if noise == "interpolated":
            own = {"decoder_guidance_scale": 1.0, "decoder_num_inference_steps": INVERSION_STEPS}
            given |= {k: v for k, v in own.items() if given[k] is None}
        self._check_ends(ends, steps, weights, noise, generator)
        count = steps if weights is None else len(weights)
        inputs = callback_on_step_end_tensor_inputs
        generator = generator or fresh_generator()
        call = self._begin(count, 1, given, generator, size, height, width, output_type, callback_on_step_end, inputs)

        found = [self._end(end, call) for end in ends if not self.interrupt]
        if self.interrupt:
            return self._finish(self._no_pictures(call), call, None, output_type, return_dict)
        points = torch.cat(found)  # [ends, D]
        embedding = self._between(points, steps, weights)  # [P, D]
        text = self._encode_prompt("", None, 1, None, None, count)
        start, scheduler = self._noises(ends, points, count, noise, call)
        call = self._alike(call, count)
        picture = self._draw_picture(text, embedding, call, start, scheduler)
        return self._finish(picture, call, None, output_type, return_dict)

    def _check_ends(self, ends: Any, steps: Any, weights: Any, noise: Any, generator: Any) -> None:
        kinds = (str, Image.Image)
        if not isinstance(ends, list | tuple) or len(ends) < 2 or not all(isinstance(e, kinds) for e in ends):
            raise ValueError(f"ends must be two or more sentences and PIL pictures, got {ends!r}")
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
        pictures = any(isinstance(e, Image.Image) for e in ends)
        if pictures and (self.image_encoder is None or self.feature_extractor is None):
            raise ValueError("this checkpoint has no image_encoder and feature_extractor, which pictures need")

    def _end(self, end: str | Image.Image, call) -> Tensor:
        """An end's image embedding [1, D]."""
        if isinstance(end, Image.Image):
            embedding = self._encode_image(end)
        else:
            embedding = self._draw_embedding(self._encode_prompt(end, None, 1, None, None), call, None)
        return embedding.to(working_dtype(self.decoder))

    def _between(self, points: Tensor, steps: int, weights: Sequence[Sequence[float]] | None) -> Tensor:
        """The embeddings [P, D] of the path, or of the mixtures: as long as the ends are on (weighted) average."""
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

    def _noises(self, ends: Sequence, points: Tensor, count: int, mode: str, call) -> tuple[Tensor, Any]:
        """Where each picture starts, and the sampler that takes it from there (None: the decoder's own)."""
        shape = (1, 3, call.height, call.width)
        if mode == "fixed":
            return self._start(shape, self.decoder, call.generator, None).expand(count, -1, -1, -1), None
        starts = []
        for end, point in zip(ends, points, strict=True):
            if isinstance(end, Image.Image):
                empty = self._encode_prompt("", None, 1, None, None)
                starts.append(self._invert(self._pictures(end, call), empty, point[None], call))
            else:
                starts.append(self._start(shape, self.decoder, call.generator, None))
        shares = torch.linspace(0, 1, count, dtype=starts[0].dtype, device=starts[0].device)
        first, second = (s.flatten(1).expand(count, -1) for s in starts)
        return slerp(first, second, shares).unflatten(1, shape[1:]), self._ddim()


class UnCLIPTextDiffPipeline(UnCLIPInterpolationPipeline):
    """A picture changed as one sentence differs from another (paper, section 3.3)."""

    @torch.no_grad()
    def __call__(
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
    ) -> ImagePipelineOutput | tuple:
        """Draw the picture at each strength: its embedding turned by that share towards the texts' difference.

        Args:
            image: the picture; it is inverted to the noise that DDIM draws it from, so that strength 0 gives it back.
            target: what it should become; `source`: what it is (default: the empty sentence, the paper's other baseline).
            strength: shares of the great circle from the picture's embedding to the normalised difference of the texts'
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
            raise ValueError(f"image must be a PIL picture, got {image!r}")
        self._check_ends([image, target], 2, None, "fixed", generator)
        given = {
            "decoder_num_inference_steps": decoder_num_inference_steps,
            "super_res_num_inference_steps": super_res_num_inference_steps,
            "upsampler_1024_num_inference_steps": upsampler_1024_num_inference_steps,
            "decoder_guidance_scale": decoder_guidance_scale,
        }
        inputs, count = callback_on_step_end_tensor_inputs, len(strengths)
        generator = generator or fresh_generator()
        call = self._begin(count, 1, given, generator, size, height, width, output_type, callback_on_step_end, inputs)

        point = self._end(image, call)  # [1, D]
        texts = self._run_text_encoder([source, target])[0].to(point.dtype)
        difference = texts[1:] - texts[:1]
        if not difference.norm() > 1e-6 * texts.norm():
            raise ValueError(f"to CLIP {source!r} and {target!r} are the same: there is no difference to follow")
        difference = difference / difference.norm() * point.norm()
        shares = torch.tensor(strengths, dtype=point.dtype, device=point.device)
        embedding = slerp(point.expand(count, -1), difference.expand(count, -1), shares)
        empty = self._encode_prompt("", None, 1, None, None)
        start = self._invert(self._pictures(image, call), empty, point, call).expand(count, -1, -1, -1)
        call = self._alike(call, count)
        picture = self._draw_picture(empty.repeated(count), embedding, call, start, self._ddim())
        return self._finish(picture, call, None, output_type, return_dict)
