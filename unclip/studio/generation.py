"""Runs one model for many sessions of the page, with progress, intermediate images and cancellation."""

# B images, H height, W width

import queue
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..pipelines import (
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPInterpolationPipeline,
    UnCLIPPipeline,
    UnCLIPPriorPipeline,
    UnCLIPTextDiffPipeline,
)
from ..pipelines.samplers import SAMPLERS
from ..pipelines.stages.text import encode_texts
from ..server.keys import Rate
from ..server.worker import FunctionWork, Worker

OWN = "the model's own"
STAGE_LABELS = {
    "prior": "Imagining",
    "inversion": "Finding the image's noise",
    "decoder": "Drawing at 64 px",
    "upsampler_256": "Enlarging to 256 px",
    "upsampler_1024": "Enlarging to 1024 px",
}
CANDIDATES = 4  # image embeddings that Explore compares
TRAJECTORY = 12  # intermediate images that Explore shows
MAX_TIMED = 256  # kinds of calls whose durations are kept


@dataclass(frozen=True)
class Step:
    """The progress of a call: step `done` of `of` of a stage, estimated seconds left, and intermediate images, if any."""

    stage: str
    done: int
    of: int
    seconds_left: float | None = None
    images: list[Image.Image] | None = None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", about {max(round(self.seconds_left), 1)} s left"
        return f"{STAGE_LABELS.get(self.stage, self.stage)}: step {self.done} of {self.of}{left}" if self.of else self.stage


@dataclass
class Exploration:
    """How an image was generated.

    Attributes:
        candidates: Images of the prior's embeddings, with the embedding's cosine to the prompt.
        trajectory: Predicted x0 at some steps of the decoder.
        stages: The final image of each stage.
        images: The finished image; empty if the call was cancelled.
    """

    candidates: list[tuple[float, Image.Image]]
    trajectory: list[Image.Image] = field(default_factory=list)
    stages: list[Image.Image] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


class Studio:
    """The pipelines over one model's networks, run one call at a time by `worker`, for any number of sessions."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        model: str = "emoji",
        worker: Worker | None = None,
        content_filter: Callable[[str | Image.Image], str | None] | None = None,
        rate: Rate | None = None,
    ):
        pipe.set_progress_bar_config(disable=True)
        self.rate = rate
        self.pipe, self.model, self.worker, self.content_filter = pipe, model, worker or Worker(), content_filter
        self.has_image_tower = pipe.image_encoder is not None and pipe.feature_extractor is not None
        self._jobs: dict[str, Future] = {}
        self._durations: dict[tuple, list[float]] = {}  # by kind of call: the seconds at which its stages ended the last time

    def default(self, name: str) -> Any:
        """A setting's default: the checkpoint's, else the package's."""
        return self.pipe.sampling_settings({})[name]

    # ------------------------------------------------------------------------------------------ calls

    def create(self, prompt: str, negative: str, seeds: list[int], sampler: str = OWN, **settings: Any) -> Callable:
        if sampler not in (OWN, *SAMPLERS):
            raise ValueError(f"the sampler must be one of {', '.join((OWN, *SAMPLERS))}, got {sampler!r}")
        settings |= {"sampler": None if sampler == OWN else sampler}
        pipe: Any = self.pipe
        prompts, count = [prompt] * len(seeds), len(seeds)

        def sample(progress: "ProgressCallback") -> list[Image.Image]:
            call = self._call(seeds, progress.for_kind("create", count, **settings))
            return pipe(prompts, negative_prompt=negative or None, **call, **settings).images

        return sample

    def vary(self, image: Image.Image, seeds: list[int], **settings: Any) -> Callable:
        pipe: Any = UnCLIPImageVariationPipeline.from_pipe(self.pipe)
        images = [image] * len(seeds)
        kind = ("vary", len(seeds))
        return lambda progress: pipe(images, **self._call(seeds, progress.for_kind(*kind, **settings)), **settings).images

    def blend(self, ends: list[str | Image.Image], steps: int, seed: int, **settings: Any) -> Callable:
        pipe: Any = UnCLIPInterpolationPipeline.from_pipe(self.pipe)
        generator = torch.Generator().manual_seed(seed)
        call: dict[str, Any] = {"steps": steps, "generator": generator}
        kind = ("blend", steps, *(isinstance(end, str) for end in ends))  # the prior runs for each sentence
        return lambda progress: pipe(ends, **call, callback_on_step_end=progress.for_kind(*kind, **settings), **settings).images

    def edit(
        self, image: Image.Image, target: str, source: str, strengths: list[float], seed: int, **settings: Any
    ) -> Callable:
        pipe: Any = UnCLIPTextDiffPipeline.from_pipe(self.pipe)
        generator = torch.Generator().manual_seed(seed)
        arguments, kind = (image, target, source, strengths), ("edit", len(strengths))
        return lambda progress: (
            pipe(*arguments, generator=generator, callback_on_step_end=progress.for_kind(*kind, **settings), **settings).images
        )

    def inpaint(self, prompt: str, image: Image.Image, mask: Image.Image, seeds: list[int], **settings: Any) -> Callable:
        pipe: Any = UnCLIPInpaintPipeline.from_pipe(self.pipe)
        count = len(seeds)
        call: dict[str, Any] = {"num_images_per_prompt": count}
        kind = ("inpaint", count, image.width / image.height)
        return lambda progress: (
            pipe(prompt, image, mask, **call, **self._call(seeds, progress.for_kind(*kind, **settings)), **settings).images
        )

    def explore(self, prompt: str, seed: int, size: int) -> Callable:
        """Samples an `Exploration`: candidates of the prior, and the stages of the nearest one's image."""
        prior: Any = UnCLIPPriorPipeline.from_pipe(self.pipe)
        drawing: Any = UnCLIPImageVariationPipeline.from_pipe(self.pipe)

        def sample(progress: "ProgressCallback") -> Exploration:
            progress.for_kind("explore", size=size)
            seeds = [seed + n for n in range(CANDIDATES)]
            one: dict[str, Any] = {"num_images_per_prompt": CANDIDATES, "prior_candidates": 1}
            embeddings = prior(prompt, **one, **self._call(seeds, progress)).image_embeds  # [K, D]
            if prior.interrupt:  # the next call would take a step before it is interrupted
                return Exploration([])
            text = encode_texts(prior, [prompt])[0]
            scores = (normalize(embeddings.float(), dim=-1) @ normalize(text.float(), dim=-1)[0]).tolist()
            small: dict[str, Any] = {"prompt": prompt, "size": self.pipe.sizes[0]}
            drawn = drawing(image_embeddings=embeddings, **small, **self._call([seed] * CANDIDATES, progress)).images
            order = sorted(range(CANDIDATES), key=lambda n: -scores[n])
            found = Exploration([(scores[n], drawn[n]) for n in order if n < len(drawn)])
            if drawing.interrupt:
                return found

            def record(pipe: Any, i: int, t: Tensor, tensors: dict) -> dict:
                last = pipe.num_timesteps - 1
                if pipe.stage == "decoder" and i in {round(n * last / (TRAJECTORY - 1)) for n in range(TRAJECTORY)}:
                    found.trajectory += to_images(tensors["pred_original_sample"])
                if i == last:
                    found.stages += to_images(tensors["pred_original_sample"])
                return progress(pipe, i, t, tensors)

            record.tensor_inputs = ProgressCallback.tensor_inputs  # type: ignore[attr-defined] # read by the pipeline
            best = embeddings[order[0]][None]
            images = drawing(image_embeddings=best, prompt=prompt, size=size, **self._call([seed], record)).images
            return found if drawing.interrupt else replace(found, images=images)

        return sample

    def _call(self, seeds: list[int], callback: Callable) -> dict[str, Any]:
        return {"generator": [torch.Generator().manual_seed(s) for s in seeds], "callback_on_step_end": callback}

    # ------------------------------------------------------------------------------------------ running them

    def stream(self, session: str, sample: Callable, client: str | None = None) -> Generator[Step, None, Any]:
        """Run `sample` in the worker, in `client`'s turn; yields its steps and returns its result, or None if cancelled.

        A session runs one call at a time: the one before is cancelled, and so is this one if the generator is closed. Raises
        what `sample` raises, and Busy.
        """
        events: queue.SimpleQueue[Step | None] = queue.SimpleQueue()

        def job(is_wanted: Callable[[], bool]) -> Any:
            progress = ProgressCallback(events, is_wanted, self._durations)
            result = sample(progress)
            progress.finish()
            return result

        self.cancel(session)
        (answer,) = self.worker.submit(client or session, FunctionWork("studio"), [job])
        self._jobs[session] = answer
        answer.add_done_callback(lambda _: events.put(None))
        try:
            yield Step("Waiting for the model", 0, 0)
            yield from _latest(events)
            return None if answer.cancelled() else answer.result()
        finally:
            answer.cancel()
            if self._jobs.get(session) is answer:
                del self._jobs[session]

    def is_busy(self, session: str) -> bool:
        return session in self._jobs

    def cancel(self, session: str) -> bool:
        """Cancel the session's call, which stops after its current step. Returns whether there was one."""
        answer = self._jobs.pop(session, None)
        return answer is not None and answer.cancel()


class ProgressCallback:
    """A step callback that sends each step as an event, and interrupts the pipeline once the call is not wanted.

    Intermediate images are the predicted x0. The seconds left are those of the last call of the same kind (`for_kind`) at
    this step; None for the first call.
    """

    tensor_inputs = ["pred_original_sample"]

    def __init__(
        self, events: queue.SimpleQueue[Step | None], is_wanted: Callable[[], bool], durations: dict[tuple, list[float]]
    ):
        self._events, self._is_wanted, self._durations = events, is_wanted, durations
        self._kind: tuple | None = None
        self._began = time.monotonic()
        self._ends: list[float] = []  # of the stages so far, in seconds; a stage that runs twice counts twice
        self._last = ("", 0)

    def for_kind(self, *what: Any, **settings: Any) -> "ProgressCallback":
        """Set the kind of call: everything that its duration depends on; of a guidance scale, whether it exceeds 1."""
        scales = {name: value > 1 for name, value in settings.items() if name.endswith("guidance_scale") and value is not None}
        self._kind = (*what, *sorted((settings | scales).items()))
        return self

    def __call__(self, pipe: UnCLIPPipeline, i: int, t: Tensor, tensors: dict) -> dict:
        pipe._interrupt = not self._is_wanted()
        stage, of = pipe.stage or "", max(pipe.num_timesteps, i + 1)  # an autoregressive prior has no timesteps
        before, self._last = self._last, (stage, i)
        if stage != before[0] or i < before[1] or (i == before[1] and i + 1 == of):  # only a last step is never repeated
            self._ends.append(0.0)
        self._ends[-1] = time.monotonic() - self._began
        shown = stage == "decoder" or (stage.startswith("upsampler") and i + 1 == of)
        images = to_images(tensors["pred_original_sample"]) if shown else None
        self._events.put(Step(stage, i + 1, of, self._seconds_left((i + 1) / of), images))
        return {}

    def _seconds_left(self, share: float) -> float | None:
        """Estimated seconds left after this share of the current stage."""
        before = self._durations.get(self._kind, []) if self._kind is not None else []
        ends, now = [0.0, *before], len(self._ends)
        return ends[-1] - ends[now - 1] - share * (ends[now] - ends[now - 1]) if now < len(ends) else None

    def finish(self) -> None:
        """Store the durations, unless the call was cancelled."""
        if self._kind is not None and self._is_wanted():
            self._durations.pop(self._kind, None)
            self._durations[self._kind] = self._ends
            if len(self._durations) > MAX_TIMED:
                del self._durations[next(iter(self._durations))]


def _latest(events: queue.SimpleQueue) -> Iterator[Step]:
    """Events until None; older ones are skipped if newer ones are there, except for their images."""
    while (event := events.get()) is not None:
        images = event.images
        while not events.empty():
            following = events.get()
            if following is None:
                return
            event, images = following, following.images or images
        yield Step(event.stage, event.done, event.of, event.seconds_left, images)


def to_images(x0: Tensor) -> list[Image.Image]:
    """PIL images of x0 [B, 3, H, W] in [-1, 1], which is clamped."""
    pixels = ((x0.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]
