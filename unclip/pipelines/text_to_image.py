"""Text to image, called as diffusers' deprecated `UnCLIPPipeline` and going on to 1024 px."""

# B prompts, K candidates a prompt, D embedding dimension, N text tokens

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn
from tqdm import tqdm

from .. import attention
from ..checkpoints import check_folder, import_own_modules, resolve
from ..precision import fast_dtype
from ..sampling import Generators, denoise, noise

logger = logging.getLogger(__name__)

# What a checkpoint that states no defaults of its own is sampled with (Karlo's values).
DEFAULTS = {
    "prior_num_inference_steps": 25,
    "decoder_num_inference_steps": 25,
    "super_res_num_inference_steps": 7,
    "upsampler_1024_num_inference_steps": 2,
    "prior_guidance_scale": 4.0,
    "decoder_guidance_scale": 8.0,
    "prior_candidates": 1,
}
MAX_IMAGES = 10_000


@dataclass
class TextCondition:
    """What the text tower says of the prompts: `embeds` [B, D], `encodings` [B, N, D], `mask` [B, N] bool.

    The `empty_*` fields hold the same of the empty prompt, for guidance.
    """

    embeds: Tensor
    encodings: Tensor
    mask: Tensor
    empty_embeds: Tensor
    empty_encodings: Tensor
    empty_mask: Tensor

    def guided(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, encodings and mask with the empty prompt's half first: [2B, ...]."""
        pairs = ((self.empty_embeds, self.embeds), (self.empty_encodings, self.encodings), (self.empty_mask, self.mask))
        return tuple(torch.cat(pair) for pair in pairs)

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.embeds, self.encodings, self.mask

    def repeated(self, times: int) -> "TextCondition":
        """Each prompt `times` times in a row."""
        fields = (f.repeat_interleave(times, 0) for f in vars(self).values())
        return TextCondition(*fields)


class UnCLIPPipeline(DiffusionPipeline):
    """Prompt -> text embedding -> image embedding -> 64 px -> 256 px -> 1024 px.

    The networks may be this package's or diffusers' stock ones (Karlo's layout): they are called alike. `defaults` are
    the sampling settings that suit the checkpoint; they are saved with it, and arguments left None take them.
    """

    model_cpu_offload_seq = (
        "text_encoder->image_encoder->prior->text_proj->decoder->super_res_first->super_res_last->upsampler_1024"
    )
    _optional_components = [
        "super_res_last",
        "image_encoder",
        "feature_extractor",
        "upsampler_1024",
        "upsampler_1024_scheduler",
    ]
    _exclude_from_cpu_offload = ["prior"]

    def __init__(
        self,
        prior: nn.Module,
        decoder: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        text_proj: nn.Module,
        super_res_first: nn.Module,
        super_res_last: nn.Module | None,
        prior_scheduler: Any,
        decoder_scheduler: Any,
        super_res_scheduler: Any,
        image_encoder: nn.Module | None = None,
        feature_extractor: Any = None,
        upsampler_1024: nn.Module | None = None,
        upsampler_1024_scheduler: Any = None,
        defaults: dict | None = None,
    ):
        super().__init__()
        unknown = set(defaults or {}) - set(DEFAULTS)
        if unknown:
            raise ValueError(f"unknown sampling defaults {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
        self.register_modules(
            prior=prior,
            decoder=decoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_proj=text_proj,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            prior_scheduler=prior_scheduler,
            decoder_scheduler=decoder_scheduler,
            super_res_scheduler=super_res_scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            upsampler_1024=upsampler_1024,
            upsampler_1024_scheduler=upsampler_1024_scheduler,
        )
        self.register_to_config(defaults=defaults)
        self._dtype_chosen = False
        for network in (prior, decoder):
            attention.install(network)

    @classmethod
    def required_components(cls) -> list[str]:
        """The names of the parts without which there is no pipeline."""
        parameters = inspect.signature(cls.__init__).parameters
        required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n != "self"]
        return [n for n in required if n not in cls._optional_components]

    # ------------------------------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike = "emoji", **kwargs) -> "UnCLIPPipeline":
        """The shipped model ("emoji"), a folder, or a Hub id (its safetensors and configurations only).

        Raises ValueError, in one line, for an unknown name and for a folder with a missing, truncated or pickled file.
        """
        folder = resolve(pretrained_model_name_or_path, kwargs.pop("revision", None))
        import_own_modules(check_folder(folder))
        kwargs.setdefault("use_safetensors", True)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)  # diffusers' new name and its old one
        pipe = super().from_pretrained(folder, **kwargs, **({"dtype": dtype} if dtype else {}))
        pipe._dtype_chosen = dtype is not None
        return pipe

    def to(self, *args, **kwargs) -> "UnCLIPPipeline":
        """As `DiffusionPipeline.to`; a dtype given here is kept, otherwise the first call takes the machine's fastest."""
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        super().to(*args, **kwargs)
        self._dtype_chosen = self._dtype_chosen or dtype is not None
        return self

    def _prepare(self) -> None:
        """Once, before the first picture: the machine's fast dtype, unless one was asked for, and its memory layout."""
        if not self._dtype_chosen:
            dtype = fast_dtype(self._execution_device)
            logger.info("running in %s on %s", dtype, self._execution_device)
            for network in self.components.values():
                if isinstance(network, nn.Module):
                    nn.Module.to(network, dtype)  # ModelMixin's own `to` warns of modules that there aren't
            self._dtype_chosen = True
        for network in (self.decoder, self.super_res_first, self.super_res_last, self.upsampler_1024):
            if network is not None:
                network.to(memory_format=torch.channels_last)

    # ------------------------------------------------------------------------------------------ the call

    @property
    def sizes(self) -> list[int]:
        """The picture sizes that this checkpoint can stop at, in pixels."""
        stages = (self.decoder, self.super_res_first, self.upsampler_1024)
        return [int(stage.config.sample_size) for stage in stages if stage is not None]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int | None = None,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | None = None,
        generator: Generators = None,
        prior_latents: Tensor | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | None = None,
        text_model_output: Any = None,
        text_attention_mask: Tensor | None = None,
        prior_guidance_scale: float | None = None,
        decoder_guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        size: int | None = None,
        prior_candidates: int | None = None,
        upsampler_1024_num_inference_steps: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for each prompt.

        Arguments left None take the checkpoint's own defaults, else 25/25/7 steps and guidance 4/8.

        Args:
            prompt: a sentence or a list of them; may be None when `text_model_output` and `text_attention_mask` are given.
            generator: one generator is one stream for the whole batch; a list gives each picture its own, so that a seed
                draws the same picture alone and in a batch.
            prior_latents, decoder_latents, super_res_latents: the stages' starting noise, [B, D], [B, 3, 64, 64],
                [B, 3, 256, 256].
            text_model_output: (text embeddings [B, D], token encodings [B, N, D]) in place of a prompt.
            prior_guidance_scale, decoder_guidance_scale: 1 is no guidance.
            output_type: "pil", "np" ([B, H, W, 3] in [0, 1]) or "pt" ([B, 3, H, W] in [0, 1]).
            size: the side of the pictures in pixels, one of `sizes`; stages past it don't run.
            prior_candidates: image embeddings drawn for each picture; the nearest to the text is kept (paper, section 2.2).

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
        settings = DEFAULTS | (self.config.defaults or {}) | {k: v for k, v in given.items() if v is not None}
        size = self.sizes[-1] if size is None else size
        self._check(
            prompt, text_model_output, text_attention_mask, num_images_per_prompt, generator, size, output_type, settings
        )
        self._prepare()

        text = self._encode_prompt(prompt, num_images_per_prompt, text_model_output, text_attention_mask)
        embedding = self._draw_embedding(text, settings, generator, prior_latents)
        picture = self._draw_picture(text, embedding, settings, generator, decoder_latents)
        if size > self.sizes[0]:
            picture = self._upsample(picture, settings, generator, super_res_latents)
        if size > self.sizes[1]:
            picture = self._upsample_1024(picture, settings, generator)

        self.maybe_free_model_hooks()
        images = self._output(picture, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(
        self, prompt, text_model_output, text_attention_mask, num_images, generator, size, output_type, settings
    ) -> None:
        if prompt is None:
            if text_model_output is None or text_attention_mask is None:
                raise ValueError("give a prompt, or both text_model_output and text_attention_mask")
            count = len(text_model_output[0])
        else:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(prompts, list) or not prompts:
                raise ValueError(f"prompt must be a str or a non-empty list of str, got {prompt!r}")
            for one in prompts:
                if not isinstance(one, str):
                    raise ValueError(f"prompt must be a str or a list of str, got {one!r} ({type(one).__name__})")
                if not one.strip():
                    raise ValueError(f"prompt is empty: {one!r}")
            count = len(prompts)
        if not isinstance(num_images, int) or num_images < 1 or count * num_images > MAX_IMAGES:
            raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {count} prompts x {num_images!r}")
        if isinstance(generator, list) and len(generator) != count * num_images:
            raise ValueError(f"{len(generator)} generators were given for {count * num_images} images")
        if size not in self.sizes:
            raise ValueError(f"size must be one of {', '.join(map(str, self.sizes))}, got {size!r}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        for name, value in settings.items():
            if name.endswith("scale"):
                if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                    raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
            elif not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    # ------------------------------------------------------------------------------------------ stages

    def _encode_prompt(
        self, prompt: str | list[str] | None, num_images: int, text_model_output: Any, text_attention_mask: Tensor | None
    ) -> TextCondition:
        device = self._execution_device
        if prompt is None:
            embeds, encodings = text_model_output[0].to(device), text_model_output[1].to(device)
            mask = text_attention_mask.to(device).bool()
        else:
            embeds, encodings, mask = self._run_text_encoder([prompt] if isinstance(prompt, str) else prompt)
        empty = self._run_text_encoder([""])
        rows = len(embeds)
        one_each = TextCondition(embeds, encodings, mask, *(e.expand(rows, *e.shape[1:]) for e in empty))
        return one_each.repeated(num_images)

    def _run_text_encoder(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        for n, whole in enumerate(self.tokenizer(prompts, padding=False, verbose=False)["input_ids"]):
            if len(whole) > length:
                kept = self.tokenizer.decode(tokens.input_ids[n], skip_special_tokens=True)
                everything = self.tokenizer.decode(whole, skip_special_tokens=True)
                logger.warning("the prompt is longer than %d tokens; cut off: %r", length, everything[len(kept) :].strip())
        tokens = tokens.to(self._execution_device)
        output = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool()

    def _draw_embedding(self, text: TextCondition, settings: dict, generator: Generators, latents: Tensor | None) -> Tensor:
        """CLIP image embeddings [B, D]: of each picture's candidates the nearest to its text."""
        candidates = int(settings["prior_candidates"]) if latents is None else 1
        rows, dim = len(text.embeds) * candidates, self.prior.config.embedding_dim
        guidance = settings["prior_guidance_scale"]
        conditions = text.repeated(candidates)
        embeds, encodings, mask = conditions.guided() if guidance > 1 else conditions.plain()
        if isinstance(generator, list):
            generator = [g for g in generator for _ in range(candidates)]
        start = self._start((rows, dim), self.prior, generator, latents)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            answer = self.prior(
                x.to(self.prior.dtype), timestep=t, proj_embedding=embeds, encoder_hidden_states=encodings, attention_mask=mask
            )
            return answer.predicted_image_embedding.to(x.dtype)

        steps = settings["prior_num_inference_steps"]
        drawn = denoise(
            predict, start, self.prior_scheduler, steps, guidance=guidance, generator=generator, progress=self._bar("prior")
        )
        drawn = self.prior.post_process_latents(drawn)
        if candidates == 1:
            return drawn
        drawn = drawn.unflatten(0, (-1, candidates))  # [B, K, D]
        best = (drawn * text.embeds[:, None].to(drawn.dtype)).sum(-1).argmax(1)  # [B]
        return drawn[torch.arange(len(drawn), device=drawn.device), best]

    def _draw_picture(
        self, text: TextCondition, embedding: Tensor, settings: dict, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1]."""
        guidance = settings["decoder_guidance_scale"]
        embeds, encodings, mask = text.guided() if guidance > 1 else text.plain()
        context, added = self.text_proj(
            image_embeddings=embedding.to(self.text_proj.dtype),
            prompt_embeds=embeds,
            text_encoder_hidden_states=encodings,
            do_classifier_free_guidance=guidance > 1,
        )
        mask = F.pad(mask, (self.text_proj.clip_extra_context_tokens, 0), value=True)
        side = self.decoder.config.sample_size
        start = self._start((len(embedding), self.decoder.config.in_channels, side, side), self.decoder, generator, latents)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            answer = self.decoder(
                sample=x.to(self.decoder.dtype),
                timestep=t,
                encoder_hidden_states=context,
                class_labels=added,
                attention_mask=mask,
            )
            return answer.sample.to(x.dtype)

        steps = settings["decoder_num_inference_steps"]
        drawn = denoise(
            predict, start, self.decoder_scheduler, steps, guidance=guidance, generator=generator, progress=self._bar("decoder")
        )
        return drawn.clamp(-1, 1)

    def _upsample(self, picture: Tensor, settings: dict, generator: Generators, latents: Tensor | None) -> Tensor:
        """64 px to 256 px. Karlo's last step has a network of its own."""
        steps = settings["super_res_num_inference_steps"]
        first, last = self.super_res_first, self.super_res_last or self.super_res_first
        networks = [first] * (steps - 1) + [last]
        return self._enlarge(picture, networks, self.super_res_scheduler, generator, latents, "upsampler 256")

    def _upsample_1024(self, picture: Tensor, settings: dict, generator: Generators) -> Tensor:
        """256 px to 1024 px."""
        networks = [self.upsampler_1024] * settings["upsampler_1024_num_inference_steps"]
        return self._enlarge(picture, networks, self.upsampler_1024_scheduler, generator, None, "upsampler 1024")

    def _enlarge(
        self,
        picture: Tensor,
        networks: list[nn.Module],
        scheduler: Any,
        generator: Generators,
        latents: Tensor | None,
        name: str,
    ) -> Tensor:
        """Pictures [B, 3, h, w] in [-1, 1] at the networks' size; `networks` holds the one for each step."""
        side = networks[0].config.sample_size
        low = F.interpolate(
            picture if picture.dtype == torch.float64 else picture.float(),
            (side, side),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )
        start = self._start((len(picture), picture.shape[1], side, side), networks[0], generator, latents)
        remaining = iter(networks)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            network = next(remaining)
            return network(sample=torch.cat([x, low], 1).to(network.dtype), timestep=t).sample.to(x.dtype)

        return denoise(predict, start, scheduler, len(networks), generator=generator, progress=self._bar(name)).clamp(-1, 1)

    def _start(self, shape: tuple[int, ...], network: nn.Module, generator: Generators, latents: Tensor | None) -> Tensor:
        """A stage's starting noise; float64 for float64 networks, else float32."""
        dtype = torch.float64 if network.dtype == torch.float64 else torch.float32
        device = self._execution_device
        if latents is None:
            return noise(shape, generator, device, dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {list(shape)}, got {list(latents.shape)}")
        return latents.to(device, dtype)

    def _bar(self, name: str) -> Callable[[Iterable], Iterable]:
        settings = {"desc": name} | getattr(self, "_progress_bar_config", {})
        return lambda steps: tqdm(steps, **settings)

    def _output(self, picture: Tensor, output_type: str) -> Any:
        images = (picture / 2 + 0.5).clamp(0, 1)
        images = images if images.dtype == torch.float64 else images.float()
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
