"""What the pipelines share: the stages of the cascade, and diffusers' conventions around them."""

# B pictures, K candidates a picture, D embedding dimension, N text tokens, H height, W width

import logging
import math
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
)
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from decoder import of_context
from prior.cache import predictor
from upsamplers.degrade import add_noise, noise_labels

from ..clip.characters import read_characters
from ..clip.model import CLIP, PARTS
from ..diffusion.guidance import apply_guidance
from ..diffusion.predictions import offset_x0, predict_x0
from ..diffusion.sampling import Generators, OnStep, Predict, denoise, noise
from ..diffusion.scheduler import UnCLIPScheduler, own
from ..diffusion.schedules import dpm_solver
from ..diffusion.tiling import tiled
from ..io.images import on_white, towards_square
from ..networks import embedding_dim, told_of_noise
from ..runtime import attention
from ..runtime.compiling import compiled, why_not
from ..runtime.config import nearest
from ..runtime.memory import at_hand, out_of_memory
from ..runtime.precision import fast_dtype, slowdown, working_dtype
from ..runtime.profiling import Profile
from .distilled import Distilled
from .loading import Loading, Shared

logger = logging.getLogger(__name__)

# What a checkpoint that states no defaults of its own is sampled with (Karlo's values).
DEFAULTS = {
    "prior_num_inference_steps": 25,
    "decoder_num_inference_steps": 25,
    "super_res_num_inference_steps": 7,
    "upsampler_1024_num_inference_steps": 2,
    "prior_guidance_scale": 4.0,
    "decoder_guidance_scale": 8.0,
    "decoder_guidance_interval": [0.0, 1.0],
    "decoder_timestep_shift": 1.0,
    "prior_candidates": 1,
    "upsampler_noise_level": 0.0,
}
_OF_EVERY_CALL = ("decoder_guidance_interval", "decoder_timestep_shift", "upsampler_noise_level")
MAX_IMAGES = 10_000
SLOW = 1.5  # times as long as float32: a dtype that was asked for and is slower than that is warned of
STAGES = ("text_encoder", "image_encoder", "prior", "inversion", "decoder", "upsampler_256", "upsampler_1024")
# The decoder's samplers with the fewest steps that each can take: DPM-Solver++ of second and third order (arXiv 2211.01095),
# DDIM (arXiv 2010.02502), and ancestral sampling, with the network's own variance where it predicts one (arXiv 2102.09672).
SAMPLERS = {"dpmsolver++2m": 2, "dpmsolver++3m": 3, "ddim": 1, "ancestral": 1}
DISTILLED = "distilled"  # where the checkpoint has a distilled decoder: that, in as few steps as it was made for
INVERSION_STEPS = 50  # of a picture's way to its noise and back
BATCH = {64: 16, 256: 8, 1024: 4}  # size: pictures that are best drawn at once, bounded by memory at 1024 px
TILE_OVERLAP = 0.25  # of a tile's side, when a picture is larger than its upsampler was made for
# Both directions of DDIM take the same steps, and clip nothing on the way: what is clipped cannot be undone.
_DDIM = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "thresholding": False}
Callback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class TextCondition:
    """What the text tower says of the prompts: `embeds` [B, D], `encodings` [B, N, D], `mask` [B, N] bool.

    The `empty_*` fields hold the same of what guidance leads away from: the empty or the negative prompt. `style` [B] int64
    numbers the drawing styles of checkpoints that have some, their count for "not named".
    """

    embeds: Tensor
    encodings: Tensor
    mask: Tensor
    empty_embeds: Tensor
    empty_encodings: Tensor
    empty_mask: Tensor
    style: Tensor | None = None

    def guided(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, encodings and mask with the empty prompt's half first: [2B, ...]."""
        pairs = ((self.empty_embeds, self.embeds), (self.empty_encodings, self.encodings), (self.empty_mask, self.mask))
        return tuple(torch.cat(pair) for pair in pairs)

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.embeds, self.encodings, self.mask

    def repeated(self, times: int) -> "TextCondition":
        """Each prompt `times` times in a row."""
        return TextCondition(*(None if f is None else f.repeat_interleave(times, 0) for f in vars(self).values()))

    def __getitem__(self, rows: slice) -> "TextCondition":
        return TextCondition(*(None if f is None else f[rows] for f in vars(self).values()))

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass
class Call:
    """One call's settings: the stages' steps and guidance, the random stream, and how large each stage draws."""

    settings: dict[str, Any]
    generator: Generators
    last: int  # the last stage that runs: 0 decoder, 1 64 -> 256, 2 256 -> 1024
    height: int  # of the decoder's picture
    width: int
    distilled: Distilled | None = None  # what draws in the full decoder's place
    batch: int = MAX_IMAGES  # pictures that a stage draws at once

    @property
    def guided(self) -> bool:
        """Whether any stage is guided; where none is, guidance scales below 1 mean nothing, as they always did."""
        return any(v > 1 for k, v in self.settings.items() if k.endswith("guidance_scale"))

    def guidance(self, stage: str) -> float:
        return self.settings[f"{stage}_guidance_scale"] if self.guided else 1.0


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError for a sampling setting, of those in `DEFAULTS`, that cannot be; the message names it and its value."""
    for name, value in settings.items():
        if name.endswith("scale"):
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        elif name.endswith("interval"):
            numbers = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
            if not numbers or not 0 <= value[0] < value[1] <= 1:
                raise ValueError(f"{name} must be (low, high) with 0 <= low < high <= 1, got {value!r}")
        elif name.endswith("shift"):
            if not isinstance(value, int | float) or not 0.01 <= value <= 100:
                raise ValueError(f"{name} must be from 0.01 to 100, got {value!r}")
        elif name.endswith("level"):
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
        elif not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


class UnCLIPBase(Loading):
    """Prompt -> text embedding -> image embedding -> 64 px -> 256 px -> 1024 px, with diffusers' conventions around it."""

    _exclude_from_cpu_offload = ["prior"]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def _register(self, defaults: dict | None, **components: Any) -> None:
        """Take the components in: schedulers of this package in place of retired ones, parts that fit each other."""
        unknown = set(defaults or {}) - set(DEFAULTS)
        if unknown:
            raise ValueError(f"unknown sampling defaults {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
        check_settings(defaults or {})
        components = {n: own(c) if n.endswith("scheduler") and c is not None else c for n, c in components.items()}
        check_fit(components)
        prior = components.get("prior")
        if prior is not None and not draws_itself(prior) and components.get("prior_scheduler") is None:
            raise ValueError(f"a {type(prior).__name__} is a diffusion prior and needs a prior_scheduler")
        if components.get("upsampler_1024") is not None and components.get("upsampler_1024_scheduler") is None:
            raise ValueError("an upsampler_1024 needs an upsampler_1024_scheduler")
        self.register_modules(**components)
        self.register_to_config(defaults=defaults)
        self._shared, self._dtype_judged = Shared(), False
        self._stage: str | None = None
        self._num_timesteps = 0
        self._interrupt = False
        self._callback: Callback | None = None
        self._callback_inputs: list[str] = []
        self._profile: Profile | None = None
        for network in self._networks("prior", "text_proj", "decoder"):
            if not hasattr(network, "attention_backend"):  # a sibling of the pipeline that chose one shares its networks
                attention.install(network)

    def set_attention(self, backend: str) -> None:
        """Run the prior's and the decoder's attention through "auto", "xformers", "sdpa" or "math".

        Raises ValueError, saying why, for one that cannot run on this machine.
        """
        for network in self._networks("prior", "text_proj", "decoder"):
            attention.install(network, backend)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """diffusers' name for `set_attention("xformers")`, whose kernels take unCLIP's masks; `attention_op` is not used."""
        self.set_attention("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """diffusers' name for `set_attention("sdpa")`."""
        self.set_attention("sdpa")

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Nothing to do: where attention is large, the kernels here never hold all of its scores."""

    def disable_attention_slicing(self) -> None:
        """Nothing to do either."""

    def compile(self) -> None:
        """Compile the decoder and the upsamplers by `torch.compile`.

        The compiler runs in a first call, and again for every other number of pictures, size and kind of guidance; a minute or
        more each, and then every step is faster. Raises ValueError, saying why, where nothing can be compiled.
        """
        reason = why_not(self._execution_device)
        if reason:
            raise ValueError(f"the networks cannot be compiled: {reason}")
        self._in_memory("compiling")
        self._prepare()
        for network in self._networks("decoder", "super_res_first", "super_res_last", "upsampler_1024"):
            compiled(network, self._execution_device)
        self._shared.compiled = True

    def _networks(self, *names: str) -> list[nn.Module]:
        """Those of the parts named that this pipeline has."""
        found = (getattr(self, name, None) for name in names)
        return [network for network in found if network is not None]

    def _prepare(self) -> None:
        """Once, before the first picture: the machine's fast dtype, unless one was asked for, and its memory layout."""
        if not self._shared.dtype_chosen:
            dtype = fast_dtype(self._execution_device)
            logger.info("running in %s on %s", dtype, self._execution_device)
            for network in self.components.values():
                if isinstance(network, nn.Module):
                    nn.Module.to(network, dtype)  # ModelMixin's own `to` warns of modules that there aren't
            self._shared.dtype_chosen = True
        elif not self._dtype_judged and self._execution_device.type == "cpu":
            for dtype in {n.dtype for n in self._networks("prior", "decoder")} & {torch.bfloat16, torch.float16}:
                if (factor := slowdown(dtype)) > SLOW:
                    logger.warning("%s takes %.1f times as long as float32 on this CPU", dtype, factor)
        self._dtype_judged = True
        on_gpu = self._execution_device.type == "cuda"
        for network in self._networks("decoder", "super_res_first", "super_res_last", "upsampler_1024"):
            # on a CPU and in float32 diffusers' GroupNorms lose in this layout what the convolutions win
            if on_gpu or network.dtype.itemsize == 2 or not attention.is_stock(network):
                network.to(memory_format=torch.channels_last)

    # ------------------------------------------------------------------------------------------ the state of a call

    @property
    def sizes(self) -> list[int]:
        """The picture sizes that this checkpoint can stop at, in pixels."""
        return [int(n.config.sample_size) for n in self._networks("decoder", "super_res_first", "upsampler_1024")]

    @property
    def samplers(self) -> list[str]:
        """The samplers that this checkpoint's decoder can be drawn with."""
        return [*SAMPLERS, *([DISTILLED] if self._distilled is not None else [])]

    @property
    def clip(self) -> CLIP:
        """The checkpoint's CLIP: its towers, tokenizer and preprocessor as one encoder.

        With `low_memory` the towers' weights come now, and leave when the pipeline next draws.
        """
        self._have(*PARTS)
        return self._clip()

    def _clip(self) -> CLIP:
        return CLIP(**{name: getattr(self, name) for name in PARTS})

    @property
    def stage(self) -> str | None:
        """The stage that is running, one of `STAGES`; None between."""
        return self._stage

    @contextmanager
    def _working(self, stage: str, *networks: str) -> Iterator[None]:
        """While a stage runs: its name is known, its networks have their weights, and a watching `Profile` sees its costs.

        Raises MemoryError, in one line, where memory does not suffice; the pipeline stays usable.
        """
        self._stage = stage
        try:
            with self._profile.of(stage) if self._profile is not None else nullcontext():
                self._have(*networks)
                yield
        except RuntimeError as error:
            lacking = out_of_memory(error)
            if lacking is None:
                raise
            advice = "draw fewer pictures at once, a smaller size, or load the model with low_memory"
            raise MemoryError(f"out of memory in the stage {stage}, which needed {lacking} more: {advice}") from None
        finally:
            self._stage = None

    def maybe_free_model_hooks(self) -> None:
        """At the end of a call: weights that came for it leave (with `low_memory`, or under diffusers' offloading)."""
        self._have()
        super().maybe_free_model_hooks()

    @property
    def num_timesteps(self) -> int:
        """Steps of the stage that is running, or ran last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` (in a callback, say) and the call ends after the step that runs, in every pipeline alike.

        The stage's remaining steps and the stages after it are left out. Ended in the decoder or an upsampler, a call answers
        with the pictures as far as they got, at that stage's size (in the decoder still with noise); ended before that, with
        none: an empty list or batch. Of a path that is drawn in several batches, those that the stage hadn't begun are left
        out. `UnCLIPPriorPipeline` answers with its embeddings as far as they got.
        """
        return self._interrupt

    def sampling_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """What pictures are drawn with: a setting that is given and not None, else the checkpoint's own, else the package's."""
        return DEFAULTS | (self.config.defaults or {}) | {k: v for k, v in given.items() if v is not None}

    def _begin(
        self,
        count: int,
        num_images: int,
        given: dict[str, Any],
        generator: Generators,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pt",
        callback: Callback | None = None,
        callback_inputs: list[str] | None = None,
        sampler: str | None = None,
    ) -> Call:
        """Check what every pipeline is asked for, and get ready to run. Raises ValueError naming the value."""
        if sampler == DISTILLED:
            given = self._few_steps(given)
        settings = self.sampling_settings(given)
        settings = {k: v for k, v in settings.items() if k in given or k in _OF_EVERY_CALL}
        if not isinstance(num_images, int) or num_images < 1 or count * num_images > MAX_IMAGES:
            raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {count} prompts x {num_images!r}")
        streams = generator if isinstance(generator, list) else [] if generator is None else [generator]
        strangers = [g for g in streams if not isinstance(g, torch.Generator)]
        if strangers:
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {strangers[0]!r}")
        if isinstance(generator, list) and len(generator) != count * num_images:
            raise ValueError(f"{len(generator)} generators were given for {count * num_images} images")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        check_settings(settings)
        level = settings["upsampler_noise_level"]
        if level and self.sizes and not any(map(told_of_noise, self._networks("super_res_first", "upsampler_1024"))):
            raise ValueError(
                f"this checkpoint's upsamplers are told of no noise: upsampler_noise_level must be 0, got {level!r}"
            )
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be callable, got {callback!r}")
        callback_inputs = getattr(callback, "tensor_inputs", callback_inputs)  # diffusers' callback objects say it themselves
        unknown = [n for n in callback_inputs or () if n not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"a callback can be given {' or '.join(self._callback_tensor_inputs)}, not {unknown[0]!r}")
        extent = self._extent(size, height, width) if self.sizes else (0, 0, 0)
        call = Call(settings, generator, *extent, self._distilled if sampler == DISTILLED else None)
        self._callback, self._callback_inputs = callback, callback_inputs or ["latents"]
        self._interrupt = False
        self._prepare()
        return call

    def _check_enlarged(self, call: Call, super_res_latents: Tensor | None) -> None:
        """Raises ValueError for noise of a stage that does not run."""
        if super_res_latents is not None and call.last < 1:
            raise ValueError(f"super_res_latents start what is drawn above {self.sizes[0]} pixels: choose a larger size")

    def _few_steps(self, given: dict[str, Any]) -> dict[str, Any]:
        """`given` as the distilled decoder is drawn with. Raises ValueError for what it cannot be asked."""
        if self._distilled is None:
            raise ValueError(f"this checkpoint has no distilled decoder: sampler must be one of {', '.join(SAMPLERS)}")
        if hasattr(self.decoder, "_hf_hook") or hasattr(self.decoder, "_diffusers_hook"):
            raise ValueError("the sampler distilled needs the decoder's weights to stay in memory: draw without offloading")
        built_in = f"guidance of its own of scale {self._distilled.guidance:g} at timesteps of its own"
        for name in ("decoder_guidance_scale", "decoder_guidance_interval", "decoder_timestep_shift"):
            if given.get(name) is not None:
                raise ValueError(f"the distilled decoder has {built_in}: {name} cannot be chosen, got {given[name]!r}")
        most = self._distilled.evaluations
        steps = most if given["decoder_num_inference_steps"] is None else given["decoder_num_inference_steps"]
        if isinstance(steps, int) and steps > most:
            raise ValueError(f"the distilled decoder was made for {most} steps: decoder_num_inference_steps is {steps}")
        own = {"decoder_num_inference_steps": steps, "decoder_guidance_scale": 1.0}
        return given | own | {"decoder_timestep_shift": self._distilled.shift}

    def _last_stage(self, size: int | None) -> tuple[int, int]:
        """The stage that draws at `size` (None: the largest) and that size. Raises ValueError for one that none draws at."""
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size must be one of {', '.join(map(str, self.sizes))}, got {size!r}")
        return self.sizes.index(size), size

    def _extent(self, size: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """The last stage that runs, and the height and width of the decoder's picture."""
        last, size = self._last_stage(size)
        enlargement, step = size // self.sizes[0], self._side_step(last)
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = size if side is None else side
            if not isinstance(side, int) or side < 1 or side % step:
                below = math.floor(side / step) if isinstance(side, int | float) and math.isfinite(side) else size // step
                near = f"the nearest are {below * step} and {(below + 1) * step}" if below > 0 else f"the nearest is {step}"
                raise ValueError(f"{name} must be a multiple of {step} at size {size}, got {side!r}; {near}")
            sides.append(side // enlargement)
        return last, *sides

    def _side_step(self, last: int) -> int:
        """What the sides of a picture that ends with stage `last` must be multiples of."""
        sizes, networks = self.sizes, self._networks("decoder", "super_res_first", "upsampler_1024")
        return math.lcm(*(stride(n) * (sizes[last] // s) for n, s in zip(networks[: last + 1], sizes, strict=False)))

    def sides_like(self, picture: Image.Image, size: int | None = None) -> tuple[int, int]:
        """Height and width that can be drawn, of about `size` by `size` pixels, nearest to a picture's proportions.

        Raises ValueError for a picture so narrow that this would take more than twice as many pixels.
        """
        last, size = self._last_stage(size)
        step = self._side_step(last)
        stretch = math.sqrt(picture.height / picture.width)
        height, width = (max(round(side / step), 1) * step for side in (size * stretch, size / stretch))
        if height * width > 2 * size * size:
            narrow = f"a picture of {picture.width}x{picture.height} pixels is too narrow"
            raise ValueError(f"{narrow} to be drawn at about {size}x{size}; cut it, or choose a larger size")
        return height, width

    def _on_step(self, i: int, t: Tensor, latents: Tensor, clean: Callable[[], Tensor]) -> Tensor:
        if self._callback is None:
            return latents
        tensors = {"latents": lambda: latents, "pred_original_sample": clean}
        answer = self._callback(self, i, t, {name: tensors[name]() for name in self._callback_inputs})
        return (answer or {}).get("latents", latents)

    def _denoise(
        self,
        predict: Predict,
        start: Tensor,
        scheduler: Any,
        steps: int,
        call: Call,
        guidance: float = 1.0,
        eta: float = 0.0,
        on_step: OnStep | None = None,
        finished: Callable[[Tensor], Tensor] = lambda x: x,
        **more: Any,
    ) -> Tensor:
        """THE denoising loop, with this pipeline's progress bar, callback and interrupt.

        `on_step` sees each step before the callback does; `finished` is what the stage makes of a clean sample.
        """

        def after(i: int, t: Tensor, latents: Tensor, clean: Callable[[], Tensor]) -> Tensor:
            latents = latents if on_step is None else on_step(i, t, latents, clean)
            return self._on_step(i, t, latents, lambda: finished(clean()))

        self._num_timesteps = steps
        return denoise(
            predict,
            start,
            scheduler,
            steps,
            guidance=guidance,
            generator=call.generator,
            eta=eta,
            progress=self._bar(self._stage.replace("_", " ")),
            on_step=after,
            stopped=lambda: self._interrupt,
            **more,
        )

    # ------------------------------------------------------------------------------------------ stages

    def _run_text_encoder(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [B, D], encodings [B, N, D] and mask [B, N] bool."""
        prompts, length = list(map(read_characters, prompts)), self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        for n, whole in enumerate(self.tokenizer(prompts, padding=False, verbose=False)["input_ids"]):
            if len(whole) > length:
                kept = self.tokenizer.decode(tokens.input_ids[n], skip_special_tokens=True)
                everything = self.tokenizer.decode(whole, skip_special_tokens=True)
                logger.warning("the prompt is longer than %d tokens; cut off: %r", length, everything[len(kept) :].strip())
        tokens = tokens.to(self._execution_device)
        with self._working("text_encoder", "text_encoder"):
            output = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool()

    def _count_prompts(self, prompt: Any, text_model_output: Any, text_attention_mask: Tensor | None) -> int:
        """How many prompts there are. Raises ValueError, naming it, for one that is none."""
        if text_model_output is not None and text_attention_mask is not None:
            return self._count_texts(text_model_output, text_attention_mask)
        if prompt is None:
            raise ValueError("give a prompt, or both text_model_output and text_attention_mask")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts:
            raise ValueError(f"prompt must be a str or a non-empty list of str, got {prompt!r}")
        for one in prompts:
            if not isinstance(one, str):
                raise ValueError(f"prompt must be a str or a list of str, got {one!r} ({type(one).__name__})")
            if not one.strip():
                raise ValueError(f"prompt is empty: {one!r}")
            if any("\ud800" <= letter <= "\udfff" for letter in one):
                raise ValueError(f"prompt is no text in UTF-8: {one!r}")
        return len(prompts)

    def _count_texts(self, text_model_output: Any, text_attention_mask: Tensor) -> int:
        """How many texts were given encoded. Raises ValueError, naming the shapes, for some that don't fit."""
        shapes = [list(t.shape) for t in (text_model_output[0], text_model_output[1], text_attention_mask)]
        dim = embedding_dim(self.text_encoder)
        rows, tokens = len(text_model_output[0]), text_attention_mask.shape[-1]
        if shapes[0] != [rows, dim] or len(shapes[1]) != 3 or shapes[1][:2] != [rows, tokens] or shapes[2] != [rows, tokens]:
            wanted = f"[B, {dim}] and [B, N, ...], and text_attention_mask [B, N]"
            raise ValueError(f"text_model_output must be {wanted}; got {', '.join(map(str, shapes))}")
        if tokens > self.tokenizer.model_max_length:
            raise ValueError(f"text_model_output has {tokens} tokens, of which this CLIP has {self.tokenizer.model_max_length}")
        return rows

    def _encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative: str | list[str] | None,
        num_images: int,
        text_model_output: Any,
        text_attention_mask: Tensor | None,
        count: int | None = None,
    ) -> TextCondition:
        """What guides the pictures, each prompt's `num_images` in a row; a single prompt is for all of `count`."""
        if text_model_output is not None and text_attention_mask is not None:
            device = self._execution_device
            embeds, encodings = text_model_output[0].to(device), text_model_output[1].to(device)
            mask = text_attention_mask.to(device).bool()
        else:
            embeds, encodings, mask = self._run_text_encoder([prompt] if isinstance(prompt, str) else prompt)
        rows = len(embeds) if count is None else count
        if len(embeds) not in (1, rows):
            raise ValueError(f"prompt must be a str, or a list of {rows} of them, got {prompt!r}")
        away = [negative or ""] if not isinstance(negative, list) else negative
        if len(away) not in (1, rows) or not all(isinstance(n, str) for n in away):
            raise ValueError(f"negative_prompt must be a str, or a list of {rows} of them, got {negative!r}")
        same = text_model_output is None and away == ([prompt] if isinstance(prompt, str) else prompt)
        fields = [embeds, encodings, mask, *((embeds, encodings, mask) if same else self._run_text_encoder(away))]
        longest = max(fields[2].shape[1], fields[5].shape[1])
        for n in (1, 4):  # texts that were encoded elsewhere may be padded to another length
            fields[n] = F.pad(fields[n], (0, 0, 0, longest - fields[n].shape[1]))
            fields[n + 1] = F.pad(fields[n + 1], (0, longest - fields[n + 1].shape[1]))
        one_each = TextCondition(*(f.expand(rows, *f.shape[1:]) for f in fields))
        return one_each.repeated(num_images)

    @property
    def styles(self) -> list[str]:
        """The drawing styles that this checkpoint can be asked for; [] where it has none."""
        networks = (getattr(self, name, None) for name in ("text_proj", "prior"))
        return next((list(n.config.styles) for n in networks if n is not None and n.config.get("styles")), [])

    def _prior_style(self, text: TextCondition, guided: bool) -> Tensor | None:
        """The styles [B] that the prior is told, under guidance [2B] with "not named" first; None for a prior without."""
        if text.style is None or not self.prior.config.get("styles"):
            return None
        unnamed = torch.full_like(text.style, len(self.styles))
        return torch.cat([unnamed, text.style]) if guided else text.style

    def _styles(self, style: str | None, prompts: list[str] | None, count: int, generator: Generators) -> Tensor | None:
        """The numbers [B] of the styles to draw in; None for checkpoints without styles.

        `style` is for all images; else each prompt's own words decide ("a cat, flat style"), and where they name none, one is
        drawn at random. Raises ValueError for a style that this checkpoint does not have.
        """
        known = self.styles
        if style is not None and style not in known:
            choices = f"{nearest(str(style), known)}; choose from {', '.join(known)}" if known else ": this model has no styles"
            raise ValueError(f"unknown style {style!r}{choices}")
        if not known:
            return None
        if isinstance(generator, list):
            drawn = torch.cat([torch.randint(len(known), (1,), generator=g, device=g.device).cpu() for g in generator])
        else:
            device = None if generator is None else generator.device
            drawn = torch.randint(len(known), (count,), generator=generator, device=device).cpu()
        if style is not None:
            drawn = torch.full_like(drawn, known.index(style))
        named = re.compile(rf"\b({'|'.join(map(re.escape, known))}) style\b", re.IGNORECASE)
        for number, prompt in enumerate(prompts or ()) if style is None else ():
            found = named.search(prompt)
            if found:
                each = count // len(prompts)
                drawn[number * each : (number + 1) * each] = known.index(found[1].lower())
        return drawn.to(self._execution_device)

    def _seen(self, pictures: list[Image.Image]) -> Tensor:
        """Pictures as the image tower takes them: [B, 3, S, S]."""
        whole = [on_white(towards_square(picture)) for picture in pictures]
        return self.feature_extractor(images=whole, return_tensors="pt").pixel_values

    def _encode_image(self, image: Image.Image | list[Image.Image] | Tensor) -> Tensor:
        """CLIP image embeddings [B, D] of pictures, or of a tensor as `feature_extractor` makes it."""
        if not isinstance(image, Tensor):
            image = self._seen([image] if isinstance(image, Image.Image) else image)
        with self._working("image_encoder", "image_encoder"):
            return self.image_encoder(image.to(self._execution_device, self.image_encoder.dtype)).image_embeds

    def _pictures(self, image: Image.Image | list[Image.Image], call: Call) -> Tensor:
        """Pictures as the decoder would draw them: [B, 3, H, W] in [-1, 1], the middle at the decoder's size."""
        pictures = [image] if isinstance(image, Image.Image) else image
        fitted = [ImageOps.fit(on_white(p), (call.width, call.height), Image.Resampling.BICUBIC) for p in pictures]
        return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in fitted]).float() / 127.5 - 1

    def _draw_embedding(self, text: TextCondition, call: Call, latents: Tensor | None) -> Tensor:
        """CLIP image embeddings [B, D]: of each picture's candidates the nearest to its text."""
        candidates = int(call.settings["prior_candidates"]) if latents is None else 1
        rows, dim = len(text.embeds) * candidates, self.prior.config.embedding_dim
        guidance, generator = call.guidance("prior"), call.generator
        embeds, encodings, mask = text.guided() if guidance != 1 else text.plain()
        embeds, encodings = embeds.to(self.prior.dtype), encodings.to(self.prior.dtype)
        if isinstance(generator, list):
            generator = [g for g in generator for _ in range(candidates)]
        call = replace(call, generator=generator)
        with self._working("prior", "prior"):
            if draws_itself(self.prior):
                if latents is not None:
                    raise ValueError("prior_latents: an autoregressive prior starts from no noise")
                conditions = [v.repeat_interleave(candidates, 0) for v in (embeds, encodings, mask)]
                with at_hand(self.prior):
                    drawn = self._draw_tokens(conditions, call, guidance)
                return self._nearest(drawn, text, candidates)
            answer = predictor(self.prior, embeds, encodings, mask, candidates, self._prior_style(text, guidance != 1))
            start = self._start((rows, dim), self.prior, generator, latents)

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return answer(x.to(self.prior.dtype), t).to(x.dtype)

            steps = call.settings["prior_num_inference_steps"]
            drawn = self._denoise(predict, start, self.prior_scheduler, steps, call, guidance)
            with at_hand(self.prior):
                embedding = self.prior.post_process_latents(drawn)
            return self._nearest(embedding, text, candidates)

    def _draw_tokens(self, conditions: list[Tensor], call: Call, guidance: float) -> Tensor:
        """Image embeddings [B, D] of a prior that draws them itself; a callback sees its tokens, as either tensor.

        `conditions` are text embeddings, encodings and mask, under guidance those without text first.
        """
        return self.prior.draw(
            *conditions,
            guidance,
            call.generator,
            progress=self._bar("prior"),
            on_token=lambda number, tokens: self._on_step(number, torch.tensor(number), tokens, lambda: tokens),
            stopped=lambda: self._interrupt,
        )

    def _nearest(self, drawn: Tensor, text: TextCondition, candidates: int) -> Tensor:
        """Of each picture's candidates [B * K, D] the one nearest to its text: [B, D] (paper, section 2.2)."""
        if candidates == 1:
            return drawn
        drawn = drawn.unflatten(0, (-1, candidates))  # [B, K, D]
        best = (drawn * text.embeds[:, None].to(drawn.dtype)).sum(-1).argmax(1)  # [B]
        return drawn[torch.arange(len(drawn), device=drawn.device), best]

    def _alike(self, call: Call, count: int) -> Call:
        """`call` for `count` pictures that hear the same fresh noise, drawn as many at once as memory is sure to hold."""
        return replace(call, generator=copies(call.generator, count), batch=pictures_at_once(self.sizes[call.last]))

    def _in_batches(self, stage: Callable[..., Tensor], call: Call, **rows: Any) -> Iterator[Tensor]:
        """What a `stage` makes of `rows`, which have an entry for each picture or are None, `call.batch` pictures at a time."""
        count, interrupted = len(next(iter(rows.values()))), self._interrupt
        if count <= call.batch:
            yield stage(**rows, call=call)
            return
        for n in range(0, count, call.batch):
            if self._interrupt and not interrupted:
                return
            some = slice(n, n + call.batch)
            given = {name: None if value is None else value[some] for name, value in rows.items()}
            yield stage(**given, call=replace(call, generator=call.generator[some]))

    def _draw_picture(
        self, text: TextCondition, embedding: Tensor, call: Call, latents: Tensor | None, scheduler: Any = None, **more: float
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] at the decoder's size; `scheduler` in place of the decoder's own.

        None of them where the call was interrupted before; `more` are `eta` and `clip_guidance`.
        """
        decode = partial(self._decode, scheduler=scheduler or self.decoder_scheduler, **more)
        return joined(self._in_batches(decode, call, text=text, embedding=embedding, latents=latents))

    def _decode(
        self,
        text: TextCondition,
        embedding: Tensor,
        call: Call,
        latents: Tensor | None,
        scheduler: Any,
        eta: float = 0.0,
        clip_guidance: float = 0.0,
    ) -> Tensor:
        """A batch of `_draw_picture`."""
        if self._interrupt:
            return self._no_pictures(call)
        guidance = call.guidance("decoder")
        shape = (len(embedding), 3, call.height, call.width)
        steps = call.settings["decoder_num_inference_steps"]
        with self._working("decoder", "text_proj", "decoder", *(["image_encoder"] if clip_guidance else [])):
            start = self._start(shape, self.decoder, call.generator, latents)
            network = self.decoder if call.distilled is None else call.distilled.network(self.decoder)
            if self._shared.compiled:
                compiled(network, self._execution_device)
            predict = self._decoder_prediction(text, embedding, guidance, network=network)
            if clip_guidance:
                predict = self._clip_guided(predict, text.embeds, scheduler, guidance, clip_guidance)
            more = {"interval": self._guided_timesteps(call, scheduler), "shift": call.settings["decoder_timestep_shift"]}
            return self._denoise(predict, start, scheduler, steps, call, guidance, eta, **more).clamp(-1, 1)

    def _no_pictures(self, call: Call) -> Tensor:
        return torch.zeros(0, 3, call.height, call.width, device=self._execution_device)

    def _guided_timesteps(self, call: Call, scheduler: Any) -> tuple[float, float]:
        """The lowest and the highest timestep at which the decoder is guided."""
        count = scheduler.config.num_train_timesteps
        low, high = (round(share * count, 6) for share in call.settings["decoder_guidance_interval"])  # 0.29 of 100 is 29
        return low, high

    def _clip_guided(self, predict: Predict, wanted: Tensor, scheduler: Any, guidance: float, strength: float) -> Predict:
        """`predict` with its clean picture moved towards the text, as CLIP sees it (GLIDE, arXiv 2112.10741, section 2.4).

        The direction is the gradient of the cosine through the decoder's estimate of the clean picture, at unit root mean
        square; `strength` is how far it is followed, in units of the noise that is left.
        """
        clip = self._clip()
        wanted = F.normalize(wanted.float(), dim=-1)  # [B, D]

        def moved(x: Tensor, t: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                prediction = predict(x, t)
                rows = len(wanted)
                plain = prediction[:, : x.shape[1]]
                if len(x) > rows:
                    plain = apply_guidance(plain, x.shape[1], guidance)
                clean = predict_x0(scheduler, plain, x[-rows:], t.reshape(1).expand(rows))
                pixels = clip.preprocess((clean.float() / 2 + 0.5).clamp(0, 1))
                seen = clip.image_encoder(pixels.to(clip.image_encoder.dtype)).image_embeds.float()
                gradient = torch.autograd.grad(F.cosine_similarity(seen, wanted).sum(), x)[0]
            gradient = gradient.unflatten(0, (-1, rows)).sum(0)  # both halves of a guided batch are one picture
            gradient = gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
            left = (1 - scheduler.alphas_cumprod[t.long()]).sqrt().to(gradient)
            by = (strength * left * gradient).repeat(len(x) // rows, 1, 1, 1)
            towards = offset_x0(scheduler, prediction.detach()[:, : x.shape[1]], by, t.reshape(1).expand(len(x)))
            return torch.cat([towards, prediction.detach()[:, x.shape[1] :]], 1)

        return moved

    def _invert(self, picture: Tensor, text: TextCondition, embedding: Tensor, call: Call) -> Tensor:
        """The noise [B, 3, H, W] from which unguided DDIM draws `picture` [B, 3, H, W] in [-1, 1] (paper, section 3)."""
        scheduler = DDIMInverseScheduler.from_config(self._levels, **_DDIM)
        with self._working("inversion", "text_proj", "decoder"):
            start = self._start(tuple(picture.shape), self.decoder, None, picture)
            predict = self._decoder_prediction(text, embedding, 1.0)
            return self._denoise(predict, start, scheduler, call.settings["decoder_num_inference_steps"], call)

    def _ddim(self, clip: bool = False) -> DDIMScheduler:
        """The deterministic sampler whose way back is `_invert`; with `clip`, estimates of the picture stay in [-1, 1].

        A network that predicts noise says little of the picture at the highest noise levels: there clipping holds it.
        """
        return DDIMScheduler.from_config(self._levels, **(_DDIM | {"clip_sample": clip}))

    def _sampler(self, name: str | None, steps: int) -> Any:
        """The decoder's sampler of this name, one of `SAMPLERS`, on the checkpoint's own noise levels; None: its own.

        Raises ValueError for an unknown name, and for fewer steps than it needs.
        """
        if name is None:
            return self.decoder_scheduler
        if name == DISTILLED:
            return dpm_solver(self._levels, order=1)
        if name not in SAMPLERS:
            known = self.samplers
            raise ValueError(f"unknown sampler {name!r}{nearest(str(name), known)}; choose from {', '.join(known)}")
        if steps < SAMPLERS[name]:
            raise ValueError(f"the sampler {name} needs at least {SAMPLERS[name]} steps, got {steps}")
        clip = self._levels.get("clip_sample", False)
        if name == "ddim":
            return self._ddim(clip=clip)
        if name == "ancestral":
            learned = self.decoder.config.out_channels == 2 * self.decoder.config.in_channels
            kind, variance = (UnCLIPScheduler, "learned_range") if learned else (DDPMScheduler, "fixed_small")
            return kind.from_config(self._levels, variance_type=variance)
        return dpm_solver(self._levels, SAMPLERS[name], clip)

    @property
    def _levels(self) -> dict[str, Any]:
        """The decoder's schedule in full: `from_config` would put its own defaults where the other class's were kept."""
        return {k: v for k, v in self.decoder_scheduler.config.items() if k != "_use_default_values"}

    def _decoder_prediction(
        self,
        text: TextCondition,
        embedding: Tensor,
        guidance: float,
        known: Tensor | None = None,
        network: nn.Module | None = None,
    ) -> Predict:
        """The decoder as a function of the noised picture and the timestep; under guidance of both halves, or the second.

        `known` [1, 4, H, W] is for a decoder that was trained to inpaint: pixels outside a hole, and the hole's mask;
        without it the hole is everything. `network` takes the decoder's place.
        """
        decoder = self.decoder if network is None else network
        embeds, encodings, mask = text.guided() if guidance != 1 else text.plain()
        layers = {"text_mask": mask} if getattr(self.text_proj, "text_blocks", None) else {}  # diffusers' class knows of none
        if text.style is not None and self.text_proj.config.get("styles"):
            layers["style"] = text.style
        embedding = embedding.to(self.text_proj.dtype)
        context, added = self.text_proj(
            **layers,
            image_embeddings=embedding,
            prompt_embeds=embeds.to(self.text_proj.dtype),
            text_encoder_hidden_states=encodings.to(self.text_proj.dtype),
            do_classifier_free_guidance=guidance != 1,
        )
        context, added = context.to(decoder.dtype), added.to(decoder.dtype)
        draft = None
        if getattr(self.text_proj, "draft_head", None) is not None:
            draft = self.text_proj.draft_image(embedding, text.style, guidance != 1).to(decoder.dtype)
        mask = of_context(self.text_proj, mask, True)
        heard = mask.any(0)  # the others are padding in every row
        if self._shared.compiled:
            heard = torch.ones_like(heard)  # every length would be another graph
        kept = attention.of_context(decoder, context[:, heard])
        if kept:
            context, mask = context[:, heard], mask[:, heard]

        @cache
        def conditions(rows: int) -> dict[str, Any]:
            """What the decoder is told of the last `rows` rows."""
            told = {"encoder_hidden_states": context[-rows:], "class_labels": added[-rows:]}
            told["attention_mask"] = None if mask[-rows:].all() and not self._shared.compiled else mask[-rows:]
            if draft is not None:
                told["draft"] = draft[-rows:]
            if kept:
                told["cross_attention_kwargs"] = {"kept": {m: (k[-rows:], v[-rows:]) for m, (k, v) in kept.items()}}
            return told

        def predict(x: Tensor, t: Tensor) -> Tensor:
            seen = x
            if decoder.config.in_channels > x.shape[1]:
                hole = x.new_zeros(1, 4, *x.shape[2:])
                hole[:, 3] = 1
                seen = torch.cat([x, (hole if known is None else known.to(x)).expand(len(x), -1, -1, -1)], 1)
            answer = decoder(sample=seen.to(decoder.dtype), timestep=t, **conditions(len(x)))
            # copied, because a CUDA graph writes its next answer to the same place
            return answer.sample.to(x.dtype, copy=self._shared.compiled)

        return predict

    def _upsample(self, picture: Tensor, call: Call, latents: Tensor | None) -> Tensor:
        """64 px to 256 px. Karlo's last step has a network of its own."""
        steps = call.settings["super_res_num_inference_steps"]
        names = ["super_res_first"] * (steps - 1) + ["super_res_first" if self.super_res_last is None else "super_res_last"]
        return self._enlarge("upsampler_256", picture, names, self.super_res_scheduler, call, latents)

    def _upsample_1024(self, picture: Tensor, call: Call) -> Tensor:
        """256 px to 1024 px."""
        names = ["upsampler_1024"] * call.settings["upsampler_1024_num_inference_steps"]
        return self._enlarge("upsampler_1024", picture, names, self.upsampler_1024_scheduler, call, None)

    def _enlarge(
        self, stage: str, picture: Tensor, names: list[str], scheduler: Any, call: Call, latents: Tensor | None
    ) -> Tensor:
        """Pictures [B, 3, h, w] in [-1, 1] enlarged; `names` says each step's network. Skipped once interrupted.

        Where it is told of noise, the pictures get as much as the setting `upsampler_noise_level` says (arXiv 2106.15282,
        section 4.2): what the stage below got wrong is then drawn anew.
        """
        if self._interrupt:
            return picture
        networks = [getattr(self, name) for name in names]
        tile = int(networks[0].config.sample_size)
        scale = tile // self.sizes[0]
        height, width = call.height * scale, call.width * scale
        remaining = iter(networks)
        overlap = int(tile * TILE_OVERLAP)

        level = call.settings["upsampler_noise_level"] if told_of_noise(networks[0]) else 0.0

        def predict(x: Tensor, t: Tensor) -> Tensor:
            network = next(remaining)
            whole = torch.cat([x, low], 1).to(network.dtype)
            labels = {"class_labels": noise_labels(x.new_full((len(x),), level))} if told_of_noise(network) else {}

            def sharpened(part: Tensor) -> Tensor:
                return network(sample=part, timestep=t, **labels).sample.to(x.dtype, copy=self._shared.compiled)

            return tiled(sharpened, whole, tile, overlap, stride(network))

        with self._working(stage, *names):
            if level:
                grain = noise(tuple(picture.shape), call.generator, picture.device, picture.dtype)
                picture = add_noise(picture, picture.new_full((len(picture),), level), grain)
            low = F.interpolate(
                picture if picture.dtype == torch.float64 else picture.float(),
                (height, width),
                mode="bicubic",
                align_corners=False,
                antialias=True,
            )
            start = self._start((len(picture), picture.shape[1], height, width), networks[0], call.generator, latents)
            return self._denoise(predict, start, scheduler, len(networks), call).clamp(-1, 1)

    def _finish(self, picture: Tensor, call: Call, latents: Tensor | None, output_type: str, return_dict: bool):
        """The stages after the decoder, and the answer of a call."""
        parts: Iterable[Tensor] = [picture]
        if call.last >= 1:
            parts = self._in_batches(self._upsample, call, picture=picture, latents=latents)
        if call.last >= 2:
            parts = self._in_batches(self._upsample_1024, call, picture=joined(parts))
        images = joined(self._output(part, output_type) for part in parts)  # the last stage's floats one batch at a time
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _start(self, shape: tuple[int, ...], network: nn.Module, generator: Generators, latents: Tensor | None) -> Tensor:
        """A stage's starting noise; float64 for float64 networks, else float32."""
        device, dtype = self._execution_device, working_dtype(network)
        if latents is None:
            return noise(shape, generator, device, dtype)
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            got = list(latents.shape) if isinstance(latents, Tensor) else repr(latents)
            raise ValueError(f"latents must be a tensor of the shape {list(shape)}, got {got}")
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


def fresh_generator() -> torch.Generator:
    """A generator seeded by the machine's entropy, which leaves torch's global random stream as it was."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def pictures_at_once(size: int) -> int:
    """How many pictures of `size` px are best drawn together."""
    return BATCH.get(size, 4)


def copies(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """`count` generators that all go on where `generator` stands."""
    return [torch.Generator(generator.device).set_state(generator.get_state()) for _ in range(count)]


def joined(parts: Iterable) -> Any:
    """Batches of pictures as one, be they tensors, arrays or lists."""
    first, *others = parts
    if not others:
        return first
    if isinstance(first, list):
        return sum(others, first)
    return torch.cat([first, *others]) if isinstance(first, Tensor) else np.concatenate([first, *others])


def draws_itself(prior: nn.Module) -> bool:
    """Whether a prior is autoregressive: no diffusion, and no scheduler."""
    return hasattr(prior, "draw")


def stride(network: nn.Module) -> int:
    """What a network's height and width must be multiples of."""
    return getattr(network, "stride", None) or 2 ** (len(network.config.block_out_channels) - 1)


def check_fit(components: dict[str, Any]) -> None:
    """Raises ValueError, with both names and values, for components that were made for different CLIPs."""
    widths, prints = {}, {}
    for name, fields in (
        ("text_encoder", ("embedding_dim", "projection_dim")),
        ("image_encoder", ("embedding_dim", "projection_dim")),
        ("prior", ("embedding_dim",)),
        ("text_proj", ("clip_embeddings_dim",)),
    ):
        config = getattr(components.get(name), "config", None)
        if config is None:
            continue
        width = next((getattr(config, f) for f in fields if getattr(config, f, None) is not None), None)
        if width is not None:
            widths[name] = width
        if getattr(config, "clip_fingerprint", None):
            prints[name] = config.clip_fingerprint
    for what, found in (("CLIP embeddings of {} dimensions", widths), ("the CLIP {}", prints)):
        (first, value), *others = found.items() or [(None, None)]
        for name, other in others:
            if other != value:
                raise ValueError(
                    f"{first} and {name} do not belong together: {first} is made for {what.format(value)}, "
                    f"{name} for {what.format(other)}"
                )
