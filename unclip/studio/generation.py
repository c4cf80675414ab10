"""One model behind many sessions of the page: what is drawn is seen while it is drawn, and can be cancelled."""

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
from ..server.worker import Calling, Worker

OWN = "the model's own"
WHAT = {
    "prior": "Imagining",
    "inversion": "Finding the image's noise",
    "decoder": "Drawing at 64 px",
    "upsampler_256": "Enlarging to 256 px",
    "upsampler_1024": "Enlarging to 1024 px",
}
CANDIDATES = 4  # image embeddings that Explore compares
FILM = 12  # images of Explore's film
KINDS = 256  # of drawings, whose times are remembered


@dataclass(frozen=True)
class Step:
    """How far a drawing is: the stage's step `done` of `of`, seconds left as far as known, and images if there are new."""

    stage: str
    done: int
    of: int
    left: float | None = None
    images: list[Image.Image] | None = None

    def __str__(self) -> str:
        left = "" if self.left is None else f", about {max(round(self.left), 1)} s left"
        return f"{WHAT.get(self.stage, self.stage)}: step {self.done} of {self.of}{left}" if self.of else self.stage


@dataclass
class Explored:
    """How an image formed: candidates with their cosine to the prompt, what steps expected of the 64 px image, stages' ends.

    `images` holds the finished one, nothing where the call was cancelled.
    """

    candidates: list[tuple[float, Image.Image]]
    film: list[Image.Image] = field(default_factory=list)
    stages: list[Image.Image] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


class Studio:
    """The pipelines over one model's networks, run one call at a time by `worker`, for any number of sessions."""

    def __init__(
        self, pipe: UnCLIPPipeline, model: str = "emoji", worker: Worker | None = None, content_filter=None, rate=None
    ):
        pipe.set_progress_bar_config(disable=True)
        self.rate = rate
        self.pipe, self.model, self.worker, self.content_filter = pipe, model, worker or Worker(), content_filter
        self.has_image_tower = pipe.image_encoder is not None and pipe.feature_extractor is not None
        self._jobs: dict[str, Future] = {}
        self._took: dict[tuple, list[float]] = {}  # by kind of drawing: the seconds at which its stages ended the last time

    def default(self, name: str) -> Any:
        """A setting's value where nothing else is said: the checkpoint's, else the package's."""
        return self.pipe.sampling_settings({})[name]

    # ------------------------------------------------------------------------------------------ what is drawn

    def create(self, prompt: str, negative: str, seeds: list[int], sampler: str = OWN, **settings) -> Callable:
        if sampler not in (OWN, *SAMPLERS):
            raise ValueError(f"the sampler must be one of {', '.join((OWN, *SAMPLERS))}, got {sampler!r}")
        settings |= {"sampler": None if sampler == OWN else sampler}
        prompts, count = [prompt] * len(seeds), len(seeds)

        def draw(watch) -> list[Image.Image]:
            call = self._call(seeds, watch.of("create", count, **settings))
            return self.pipe(prompts, negative_prompt=negative or None, **call, **settings).images

        return draw

    def vary(self, image: Image.Image, seeds: list[int], **settings) -> Callable:
        pipe, images = UnCLIPImageVariationPipeline.from_pipe(self.pipe), [image] * len(seeds)
        like = ("vary", len(seeds))
        return lambda watch: pipe(images, **self._call(seeds, watch.of(*like, **settings)), **settings).images

    def blend(self, ends: list[str | Image.Image], steps: int, seed: int, **settings) -> Callable:
        pipe, generator = UnCLIPInterpolationPipeline.from_pipe(self.pipe), torch.Generator().manual_seed(seed)
        call = {"steps": steps, "generator": generator}
        like = ("blend", steps, *(isinstance(end, str) for end in ends))  # the prior runs for each sentence
        return lambda watch: pipe(ends, **call, callback_on_step_end=watch.of(*like, **settings), **settings).images

    def edit(self, image: Image.Image, target: str, source: str, strengths: list[float], seed: int, **settings) -> Callable:
        pipe, generator = UnCLIPTextDiffPipeline.from_pipe(self.pipe), torch.Generator().manual_seed(seed)
        given, like = (image, target, source, strengths), ("edit", len(strengths))
        return lambda watch: (
            pipe(*given, generator=generator, callback_on_step_end=watch.of(*like, **settings), **settings).images
        )

    def inpaint(self, prompt: str, image: Image.Image, mask: Image.Image, seeds: list[int], **settings) -> Callable:
        pipe, count = UnCLIPInpaintPipeline.from_pipe(self.pipe), len(seeds)
        call, like = {"num_images_per_prompt": count}, ("inpaint", count, image.width / image.height)
        return lambda watch: (
            pipe(prompt, image, mask, **call, **self._call(seeds, watch.of(*like, **settings)), **settings).images
        )

    def explore(self, prompt: str, seed: int, size: int) -> Callable:
        """-> Explored: candidates of the prior, and how the nearest one's image forms."""
        prior = UnCLIPPriorPipeline.from_pipe(self.pipe)
        drawing = UnCLIPImageVariationPipeline.from_pipe(self.pipe)

        def draw(watch) -> Explored:
            watch.of("explore", size=size)
            seeds = [seed + n for n in range(CANDIDATES)]
            one = {"num_images_per_prompt": CANDIDATES, "prior_candidates": 1}
            embeddings = prior(prompt, **one, **self._call(seeds, watch)).image_embeds  # [K, D]
            if prior.interrupt:  # the next call would begin anew, and take a step before it heard of that
                return Explored([])
            text = encode_texts(prior, [prompt])[0]
            scores = (normalize(embeddings.float(), dim=-1) @ normalize(text.float(), dim=-1)[0]).tolist()
            small = {"prompt": prompt, "size": self.pipe.sizes[0]}
            drawn = drawing(image_embeddings=embeddings, **small, **self._call([seed] * CANDIDATES, watch)).images
            order = sorted(range(CANDIDATES), key=lambda n: -scores[n])
            found = Explored([(scores[n], drawn[n]) for n in order if n < len(drawn)])
            if drawing.interrupt:
                return found

            def record(pipe, i: int, t: Tensor, tensors: dict) -> dict:
                last = pipe.num_timesteps - 1
                if pipe.stage == "decoder" and i in {round(n * last / (FILM - 1)) for n in range(FILM)}:
                    found.film += to_images(tensors["pred_original_sample"])
                if i == last:
                    found.stages += to_images(tensors["pred_original_sample"])
                return watch(pipe, i, t, tensors)

            record.tensor_inputs = Watch.tensor_inputs
            best = embeddings[order[0]][None]
            images = drawing(image_embeddings=best, prompt=prompt, size=size, **self._call([seed], record)).images
            return found if drawing.interrupt else replace(found, images=images)

        return draw

    def _call(self, seeds: list[int], watch: Callable) -> dict[str, Any]:
        return {"generator": [torch.Generator().manual_seed(s) for s in seeds], "callback_on_step_end": watch}

    # ------------------------------------------------------------------------------------------ while it is drawn

    def stream(self, session: str, draw: Callable, client: str | None = None) -> Generator[Step, None, Any]:
        """Have `draw` called by the worker, in `client`'s turn; yields its steps, returns its answer, None once cancelled.

        A session draws one thing at a time: what it drew before is cancelled. Closing the generator cancels, too. Raises
        what `draw` raises, and Busy.
        """
        events: queue.SimpleQueue[Step | None] = queue.SimpleQueue()

        def watched(wanted: Callable[[], bool]) -> Any:
            watch = Watch(events, wanted, self._took)
            drawn = draw(watch)
            watch.over()
            return drawn

        self.cancel(session)
        (answer,) = self.worker.submit(client or session, Calling("studio"), [watched])
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

    def draws(self, session: str) -> bool:
        return session in self._jobs

    def cancel(self, session: str) -> bool:
        """Drop what this session is drawing: the model is free after its step. -> whether there was something."""
        answer = self._jobs.pop(session, None)
        return answer is not None and answer.cancel()


class Watch:
    """A step's callback that tells of it, and ends the call once nobody waits.

    What is shown of an unfinished image is what the step expects of the finished one, and not the noise it is still in.
    The seconds that are left are what was left at this step of the last drawing of this kind (`of`); of a first one, None.
    """

    tensor_inputs = ["pred_original_sample"]

    def __init__(self, events: queue.SimpleQueue[Step | None], wanted: Callable[[], bool], took: dict[tuple, list[float]]):
        self._events, self._wanted, self._took = events, wanted, took
        self._kind: tuple | None = None
        self._began = time.monotonic()
        self._ends: list[float] = []  # of the stages that ran, in seconds since; one that runs twice is two
        self._last = ("", 0)

    def of(self, *what: Any, **settings: Any) -> "Watch":
        """Say what is drawn: all that the time depends on; of guidance that is whether there is any."""
        scales = {name: value > 1 for name, value in settings.items() if name.endswith("guidance_scale") and value is not None}
        self._kind = (*what, *sorted((settings | scales).items()))
        return self

    def __call__(self, pipe: UnCLIPPipeline, i: int, t: Tensor, tensors: dict) -> dict:
        pipe._interrupt = not self._wanted()
        stage, of = pipe.stage, max(pipe.num_timesteps, i + 1)  # a prior that draws tokens says no number
        before, self._last = self._last, (stage, i)
        if stage != before[0] or i < before[1] or (i == before[1] and i + 1 == of):  # only a last step is never taken again
            self._ends.append(0.0)
        self._ends[-1] = time.monotonic() - self._began
        shown = stage == "decoder" or (stage.startswith("upsampler") and i + 1 == of)
        images = to_images(tensors["pred_original_sample"]) if shown else None
        self._events.put(Step(stage, i + 1, of, self._left((i + 1) / of), images))
        return {}

    def _left(self, share: float) -> float | None:
        """Seconds left after this share of the stage that runs."""
        ends, now = [0.0, *self._took.get(self._kind, ())], len(self._ends)
        return ends[-1] - ends[now - 1] - share * (ends[now] - ends[now - 1]) if now < len(ends) else None

    def over(self) -> None:
        """Remember how long it took, unless it was cancelled."""
        if self._kind is not None and self._wanted():
            self._took.pop(self._kind, None)
            self._took[self._kind] = self._ends
            if len(self._took) > KINDS:
                del self._took[next(iter(self._took))]


def _latest(events: queue.SimpleQueue) -> Iterator[Step]:
    """Events until None, leaving out what is old by the time it is asked for, but for its images."""
    while (event := events.get()) is not None:
        images = event.images
        while not events.empty():
            following = events.get()
            if following is None:
                return
            event, images = following, following.images or images
        yield Step(event.stage, event.done, event.of, event.left, images)


def to_images(expected: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [-1, 1] or a little beyond."""
    pixels = ((expected.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]
