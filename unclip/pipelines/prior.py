"""Text to CLIP image embeddings: the prior alone (paper, section 2.2)."""

# B images, D embedding dimension

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..diffusion.sampling import Generators
from .base import Callback, CallOptions, StepCallback, UnCLIPBase
from .settings import NO_DECODER
from .stages import encode_prompt, sample_prior
from .stages.styles import choose_styles
from .stages.text import count_prompts, encoded_text


@dataclass
class UnCLIPPriorOutput(BaseOutput):
    """`image_embeds` [B, D] in CLIP's space, the decoder's input."""

    image_embeds: Tensor


class UnCLIPPriorPipeline(UnCLIPBase):
    """Prompt -> text embedding -> image embedding, for all priors: this package's, Karlo's and Kandinsky 2's."""

    model_cpu_offload_seq = "text_encoder->prior"  # type: ignore[assignment]  # DiffusionPipeline declares None
    _optional_components = ["prior_scheduler"]  # an autoregressive prior needs none

    def __init__(
        self,
        prior: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        prior_scheduler: Any = None,
        defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._register(defaults, prior=prior, text_encoder=text_encoder, tokenizer=tokenizer, prior_scheduler=prior_scheduler)

    @torch.no_grad()
    def __call__(  # noqa: PLR0913 - diffusers' interface
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int | None = None,
        generator: Generators = None,
        prior_latents: Tensor | None = None,
        text_model_output: Any = None,
        text_attention_mask: Tensor | None = None,
        prior_guidance_scale: float | None = None,
        return_dict: bool = True,
        *,
        negative_prompt: str | list[str] | None = None,
        prior_candidates: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> UnCLIPPriorOutput | tuple[Tensor]:
        """Sample `num_images_per_prompt` image embeddings for each prompt; the arguments are `UnCLIPPipeline`'s.

        Raises:
            ValueError: for an argument out of range, naming its value.
        """
        count = count_prompts(self, prompt, text_model_output, text_attention_mask)
        settings = self._settings(locals() | NO_DECODER)
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        call = self._begin(settings, count, num_images_per_prompt, generator, CallOptions(callback=callback))

        encoded = encoded_text(self, text_model_output, text_attention_mask)
        text = encode_prompt(self, prompt, negative_prompt, num_images_per_prompt, encoded)
        text.style = choose_styles(self, None, prompt, len(text), generator)
        image_embeds = sample_prior(self, text, call, prior_latents)
        self.maybe_free_model_hooks()
        return UnCLIPPriorOutput(image_embeds=image_embeds) if return_dict else (image_embeds,)
