"""The base of all pipelines: diffusers' conventions around the stages of the cascade."""

# B images, C channels, H height, W width

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..clip.model import CLIP, PARTS
from ..clip.preprocessing import ImagePreprocessor, preprocess
from ..clip.towers import Tower
from ..diffusion.sampling import DenoisingOptions, Generators, Predict, Scheduler, denoise, noise
from ..io.moved import attribute
from ..io.pixels import denormalize
from ..networks import is_noise_conditioned
from ..runtime import attention
from ..runtime.memory import out_of_memory
from ..runtime.precision import working_dtype
from ..runtime.profiling import Profile
from .acceleration import Acceleration
from .call import Call, joined
from .components import check_components
from .loading import Shared
from .samplers import DISTILLED, SAMPLERS, choose_sampler
from .settings import DEFAULTS, MAX_IMAGES, SamplingSettings, check_defaults
from .sizes import Extent, Sizes

STAGES = ("text_encoder", "image_encoder", "prior", "inversion", "decoder", "upsampler_256", "upsampler_1024")
Callback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class StepCallback:
    """`callback_on_step_end` and the names of the tensors that it gets."""

    function: Callback | None = None
    inputs: list[str] | None = None


@dataclass
class CallOptions:
    """Size, output, callback and sampler of a call."""

    extent: Extent = field(default_factory=Extent)
    output_type: str = "pt"
    callback: StepCallback = field(default_factory=StepCallback)
    sampler: str | None = None


class UnCLIPBase(Acceleration):
    """Prompt -> text embedding -> image embedding -> 64 px -> 256 px -> 1024 px, with diffusers' conventions.

    A pipeline has some of these components (`component_names`).
    """

    text_encoder: Tower
    tokenizer: PreTrainedTokenizerBase
    image_encoder: Tower | None
    feature_extractor: ImagePreprocessor | None
    prior: ModelMixin
    text_proj: ModelMixin
    decoder: ModelMixin
    super_res_first: ModelMixin
    super_res_last: ModelMixin | None
    upsampler_1024: ModelMixin | None
    prior_scheduler: Scheduler
    decoder_scheduler: Scheduler
    super_res_scheduler: Scheduler
    upsampler_1024_scheduler: Scheduler

    _exclude_from_cpu_offload = ["prior"]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def _register(self, defaults: dict[str, Any] | None, **components: Any) -> None:
        """Set the components. Raises ValueError for components that do not fit each other, and for invalid defaults."""
        check_defaults(defaults or {})
        self.register_modules(**check_components(components))
        self.register_to_config(defaults=defaults)
        self._shared = Shared()
        self._stage: str | None = None
        self._num_timesteps = 0
        self._interrupt = False
        self._callback = StepCallback()
        self._profile: Profile | None = None
        for network in self._attending():
            if not hasattr(network, "attention_backend"):  # otherwise another pipeline with these networks has set one
                attention.install(network)

    # ------------------------------------------------------------------------------------------ the checkpoint

    @property
    def sizes(self) -> list[int]:
        """The image sizes of this checkpoint's stages, in pixels."""
        return self._sizes.sizes

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self._networks("decoder", "super_res_first", "upsampler_1024"))

    @property
    def samplers(self) -> list[str]:
        """The samplers of this checkpoint's decoder."""
        return [*SAMPLERS, *([DISTILLED] if self._distilled is not None else [])]

    @property
    def styles(self) -> list[str]:
        """The drawing styles that this checkpoint is conditioned on; [] where it has none."""
        networks = self._networks("text_proj", "prior")
        return next((list(n.config["styles"]) for n in networks if n.config.get("styles")), [])

    @property
    def clip(self) -> CLIP:
        """The checkpoint's CLIP: its towers, tokenizer and preprocessor as one encoder.

        With `low_memory` the towers' weights are loaded now, and freed when the pipeline next runs.
        """
        self._load_only(*PARTS)
        return self._clip()

    def _clip(self) -> CLIP:
        return CLIP(**{name: getattr(self, name) for name in PARTS})

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        """The image tower's input [B, 3, S, S]."""
        if self.feature_extractor is None:
            raise ValueError("this checkpoint has no feature_extractor")
        return preprocess(self.feature_extractor, images)

    def sampling_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """The sampling settings: each one that is given and not None, else the checkpoint's default, else the package's."""
        found = DEFAULTS | (self.config["defaults"] or {}) | {k: v for k, v in given.items() if v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}  # as in JSON

    def sides_like(self, image: Image.Image, size: int | None = None) -> tuple[int, int]:
        """Height and width that the stages support, of about `size` by `size` pixels, nearest to an image's proportions.

        Raises ValueError for an image so narrow that this would take more than twice as many pixels.
        """
        return self._sizes.sides_like(image, size)

    # ------------------------------------------------------------------------------------------ the state of a call

    @property
    def stage(self) -> str | None:
        """The running stage, one of `STAGES`; None between stages."""
        return self._stage

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the stage that is running, or ran last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Setting `_interrupt`, for example in a callback, ends the call after the running step, in every pipeline.

        The stage's remaining steps and the stages after it are left out. Ended in the decoder or an upsampler, a call returns
        the images of the last step, at that stage's size (in the decoder with noise); ended before that, an empty list or
        batch. Of a path that is sampled in several batches, those that the stage had not begun are left out.
        `UnCLIPPriorPipeline` returns the embeddings of the last step.
        """
        return self._interrupt

    def maybe_free_model_hooks(self) -> None:
        """Free or offload weights at the end of a call, with `low_memory` or diffusers' offloading."""
        self._load_only()
        super().maybe_free_model_hooks()

    def _settings(self, arguments: Mapping[str, Any], sampler: str | None = None) -> SamplingSettings:
        """The sampling settings among a call's `arguments`; the checkpoint's defaults for those that are None or absent.

        Raises ValueError for one out of range, and for one that the sampler "distilled" does not have.
        """
        if sampler == DISTILLED:
            if self._distilled is None:
                raise ValueError(f"this checkpoint has no distilled decoder: sampler must be one of {', '.join(SAMPLERS)}")
            if hasattr(self.decoder, "_hf_hook") or hasattr(self.decoder, "_diffusers_hook"):
                raise ValueError("the sampler distilled needs the decoder's weights to stay in memory: draw without offloading")
            arguments = {**arguments, **self._distilled.arguments(arguments)}
        return SamplingSettings.resolve(self.config["defaults"], arguments)

    def _extent(self, size: int | None, height: int | None, width: int | None) -> Extent:
        """The last stage of a call, and the height and width of the decoder's image."""
        return self._sizes.extent(size, height, width)

    def _begin(
        self,
        settings: SamplingSettings,
        count: int,
        num_images: int,
        generator: Generators,
        options: CallOptions | None = None,
    ) -> Call:
        """Check the arguments that all pipelines share, and prepare the networks. Raises ValueError naming the value."""
        options = options or CallOptions()
        output_type, callback, sampler = options.output_type, options.callback, options.sampler
        if not isinstance(num_images, int) or num_images < 1 or count * num_images > MAX_IMAGES:
            raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {count} prompts x {num_images!r}")
        check_generators(generator, count * num_images)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        level = settings.upsampler_noise_level
        if level and self.sizes and not any(map(is_noise_conditioned, self._networks("super_res_first", "upsampler_1024"))):
            raise ValueError(
                f"this checkpoint's upsamplers are not conditioned on noise: upsampler_noise_level must be 0, got {level!r}"
            )
        if callback.function is not None and not callable(callback.function):
            raise ValueError(f"callback_on_step_end must be callable, got {callback.function!r}")
        inputs = getattr(callback.function, "tensor_inputs", callback.inputs)  # diffusers' callback objects have this attribute
        unknown = [n for n in inputs or () if n not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"a callback can be given {' or '.join(self._callback_tensor_inputs)}, not {unknown[0]!r}")
        call = Call(settings, generator, options.extent)
        if self.sizes:
            steps = settings.decoder_num_inference_steps
            call.scheduler = choose_sampler(sampler, steps, self.decoder_scheduler, self.decoder, self.samplers)
            call.distilled = self._distilled if sampler == DISTILLED else None
        self._callback = StepCallback(callback.function, list(inputs or ["latents"]))
        self._interrupt = False
        self._prepare()
        return call

    def _check_super_res_latents(self, call: Call, super_res_latents: Tensor | None) -> None:
        """Raises ValueError for starting noise of a stage that does not run."""
        if super_res_latents is not None and call.last < 1:
            raise ValueError(f"super_res_latents start what is drawn above {self.sizes[0]} pixels: choose a larger size")

    def _finish(self, batches: Iterable[Tensor], output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        """The return value of a call for batches of images [B, 3, H, W] in [-1, 1], which may be computed lazily."""
        images = self._collect(batches, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _collect(self, batches: Iterable[Tensor], output_type: str) -> Any:
        """All images in the format `output_type`; the end of a call."""
        images = joined(self._output(batch, output_type) for batch in batches)  # one batch in floats at a time
        self.maybe_free_model_hooks()
        return images

    def _output(self, images: Tensor, output_type: str) -> Any:
        images = denormalize(images)
        images = images if images.dtype == torch.float64 else images.float()
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    # ------------------------------------------------------------------------------------------ the context of the stages

    @contextmanager
    def _run_stage(self, stage: str, *networks: str) -> Iterator[None]:
        """Set the stage's name, load its networks' weights, and measure its cost if a `Profile` is active.

        Raises MemoryError, in one line, where memory does not suffice; the pipeline stays usable.
        """
        self._stage = stage
        try:
            with self._profile.of(stage) if self._profile is not None else nullcontext():
                self._load_only(*networks)
                yield
        except RuntimeError as error:
            lacking = out_of_memory(error)
            if lacking is None:
                raise
            advice = "draw fewer images at once, a smaller size, or load the model with low_memory"
            raise MemoryError(f"out of memory in the stage {stage}, which needed {lacking} more: {advice}") from None
        finally:
            self._stage = None

    def _denoise(
        self,
        predict: Predict,
        start: Tensor,
        scheduler: Any,
        steps: int,
        call: Call,
        options: DenoisingOptions | None = None,
    ) -> Tensor:
        """`denoise` with this pipeline's progress bar, callback and interrupt; `on_step` comes before the callback."""
        options = options or DenoisingOptions()
        first = options.on_step

        def on_step(i: int, t: Tensor, latents: Tensor, x0: Callable[[], Tensor]) -> Tensor:
            latents = latents if first is None else first(i, t, latents, x0)
            return self._on_step(i, t, latents, x0)

        self._num_timesteps = steps
        bar = self._bar((self._stage or "").replace("_", " "))
        options = replace(options, generator=call.generator, progress=bar, on_step=on_step, stopped=lambda: self._interrupt)
        return denoise(predict, start, scheduler, steps, options)

    def _on_step(self, i: int, t: Tensor, latents: Tensor, clean: Callable[[], Tensor]) -> Tensor:
        """The latents after a step: the callback's, where it returns some."""
        if self._callback.function is None:
            return latents
        tensors = {"latents": lambda: latents, "pred_original_sample": clean}
        returned = self._callback.function(self, i, t, {name: tensors[name]() for name in self._callback.inputs or ()})
        return (returned or {}).get("latents", latents)

    def _bar(self, name: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        settings: dict[str, Any] = {"desc": name} | getattr(self, "_progress_bar_config", {})
        return lambda steps: tqdm(steps, **settings)

    def _starting_noise(
        self, shape: tuple[int, ...], network: ModelMixin, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """A stage's starting noise, or `latents` instead; float64 for float64 networks, else float32."""
        device, dtype = self._execution_device, working_dtype(network)
        if latents is None:
            return noise(shape, generator, device, dtype)
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            got = list(latents.shape) if isinstance(latents, Tensor) else repr(latents)
            raise ValueError(f"latents must be a tensor of the shape {list(shape)}, got {got}")
        return latents.to(device, dtype)


def check_generators(generator: Generators, count: int) -> None:
    """Raises ValueError for anything but None, a generator or a list of one for each of `count` images."""
    streams = generator if isinstance(generator, list) else [] if generator is None else [generator]
    wrong = [g for g in streams if not isinstance(g, torch.Generator)]
    if wrong:
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {wrong[0]!r}")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"{len(generator)} generators were given for {count} images")


# the modules of the other names that this module had in version 0.1
_MOVED = ("settings", "samplers", "call", "components", "sizes", "acceleration", "stages.text", "stages.upsamplers")


def __getattr__(name: str) -> Any:
    return attribute(__name__, name, [f"{__package__}.{module}" for module in _MOVED])
