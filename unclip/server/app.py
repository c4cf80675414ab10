"""The server: OpenAI's image endpoints over one model, drawn in batches."""

import asyncio
import base64
import io
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import numpy as np
from fastapi import APIRouter, FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from PIL import Image
from starlette.exceptions import HTTPException

from .. import __version__
from ..io.images import UPLOAD_BYTES, on_white, open_upload, png_facts
from ..pipelines import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline
from . import wire
from .guard import LOOPBACK, BoundedBody, KeyCheck, LetGo, OwnPages, RequestLog
from .image_store import ImageStore
from .keys import Keys, Rate
from .metrics import Metrics
from .wire import Edit, Generation, ImageData, ImagesResponse, Model, Models, Refused, Variation
from .work import EditWork, GenerationWork, VariationWork, reduced
from .worker import Busy, Work, Worker

# A prompt, an uploaded image or a drawn one -> why it is refused, or None. Called in a thread.
ContentFilter = Callable[[str | Image.Image], str | None]
ALIAS = "dall-e-2"
DECODERS = 2  # requests whose uploads are decoded, and in memory whole, at the same time
LEAST_QUEUE = 2 * wire.MAX_IMAGES  # a client has half of it, and each request that is allowed must fit some time


@dataclass
class Settings:
    """How a server is run.

    `host` is the address it listens on. `queue` is in images; `deadline` (a request's, once it is read), `body_seconds` (for
    it to be read) and `url_seconds` in seconds; `rate` in images a minute and key. `public_url` is where clients find the
    server, if not where it finds itself. `any_host` answers to every Host header, not only to `host` and loopback's names.
    """

    model: str = "emoji"
    host: str = "127.0.0.1"
    keys: Keys | None = None
    rate: int | None = None
    queue: int = 64
    deadline: float = 120.0
    url_seconds: float = 3600.0
    body_seconds: float = 60.0
    public_url: str | None = None
    any_host: bool = False
    content_filter: ContentFilter | None = None
    log_prompts: bool = False

    def __post_init__(self):
        for name in ("deadline", "url_seconds", "body_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be more than 0 seconds, got {getattr(self, name)}")
        if self.queue < LEAST_QUEUE:
            say = f"twice the images that one request may ask for, got {self.queue}"
            raise ValueError(f"queue must be at least {LEAST_QUEUE}, {say}")
        if self.public_url is not None and not self.public_url.startswith(("http://", "https://")):
            raise ValueError(f"public_url must begin with http:// or https://, got {self.public_url!r}")


def create(pipe: UnCLIPPipeline, settings: Settings, login: str | None = None) -> FastAPI:
    """The application over a loaded pipeline; `login` is the path of a mounted page that asks for the key itself.

    `app.state` has the `worker` (which runs the model), the `rate` of clients, if they have one, the `metrics`, and
    `stopping`, which is set when the server begins to stop. Raises ValueError for settings out of range.
    """
    pipe.set_progress_bar_config(disable=True)
    metrics = Metrics()
    worker = Worker(settings.queue, metrics.drawn)
    metrics.watch(worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(worker.close, settings.deadline)

    errors = {status: {"model": wire.ErrorAnswer} for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 503, 504)}
    app = FastAPI(
        title="unclip", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors
    )  # FastAPI's pages of documentation would load scripts from elsewhere
    app.state.worker, app.state.metrics, app.state.stopping = worker, metrics, asyncio.Event()
    app.state.rate = rate = Rate(settings.rate) if settings.rate is not None else None
    app.add_exception_handler(RequestValidationError, wire.on_invalid)
    app.add_exception_handler(HTTPException, wire.on_http_error)
    app.include_router(Endpoints(pipe, settings, worker, metrics, rate, login).router)
    app.add_middleware(LetGo, stopping=app.state.stopping)
    app.add_middleware(BoundedBody, seconds=settings.body_seconds)
    app.add_middleware(KeyCheck, keys=settings.keys, login=login)
    hosts = None if settings.any_host else LOOPBACK | {settings.host.lower()}
    app.add_middleware(OwnPages, hosts=hosts, public=settings.public_url)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


class Endpoints:
    """The routes, and what they share."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        settings: Settings,
        worker: Worker,
        metrics: Metrics,
        rate: Rate | None,
        login: str | None,
    ):
        self.pipe, self.settings, self.worker, self.metrics, self.rate = pipe, settings, worker, metrics, rate
        self.image_store = ImageStore(settings.url_seconds)
        self.started = int(time.time())
        self.name = Path(settings.model).name
        self._decoders = anyio.CapacityLimiter(DECODERS)
        self._varying = self._repainting = None
        if pipe.image_encoder is not None and pipe.feature_extractor is not None:
            self._varying = UnCLIPImageVariationPipeline.from_pipe(pipe)
        self._repainting = UnCLIPInpaintPipeline.from_pipe(pipe)

        self.router = route = APIRouter()
        route.post("/v1/images/generations", response_model_exclude_none=True)(self.generations)
        route.post("/v1/images/edits", response_model_exclude_none=True)(self.edits)
        route.post("/v1/images/variations", response_model_exclude_none=True)(self.variations)
        route.get("/v1/images/files/{name}", response_class=Response)(self.file)
        route.get("/v1/models")(self.models)
        route.get("/v1/models/{name}")(self.model)
        if login is not None:
            route.get("/", include_in_schema=False)(lambda: RedirectResponse(login))
        route.get("/healthz")(self.health)
        route.get("/metrics", response_class=Response)(self.measured)

    # ------------------------------------------------------------------------------------------ endpoints

    async def generations(self, asked: Generation, request: Request) -> ImagesResponse:
        await self._filter(asked.prompt, "prompt")
        size, drawn = self._size(asked)
        seeds = self._seeds(asked)
        jobs = [(asked.prompt, seed) for seed in seeds]
        return await self._draw(request, asked, GenerationWork(self.pipe, drawn), jobs, size, seeds, {"prompt": asked.prompt})

    async def variations(self, asked: Annotated[Variation, Form()], request: Request) -> ImagesResponse:
        if self._varying is None:
            raise Refused(400, f"the model {self.name!r} has no image tower: it cannot vary images")
        size, drawn = self._size(asked)
        pixels = await self._prepared(lambda image: self._varying.preprocess([image]), image=asked.image)
        seeds = self._seeds(asked)
        jobs = [(pixels, seed) for seed in seeds]
        return await self._draw(
            request, asked, VariationWork(self._varying, drawn), jobs, size, seeds, {"variation_of": "an upload"}
        )

    async def edits(self, asked: Annotated[Edit, Form()], request: Request) -> ImagesResponse:
        await self._filter(asked.prompt, "prompt")
        size, drawn = self._size(asked)

        def prepare(image: Image.Image, mask: Image.Image | None = None) -> tuple[Image.Image, Image.Image]:
            return reduced(on_white(image), drawn), hole(image, mask, drawn)

        image, mask = await self._prepared(prepare, image=asked.image, mask=asked.mask)
        seeds = self._seeds(asked)
        work = EditWork(self._repainting, drawn, asked.prompt, image, mask)
        facts = {"prompt": asked.prompt, "inpaint_of": "an upload"}
        return await self._draw(request, asked, work, seeds, size, seeds, facts)

    async def file(self, name: str) -> Response:
        image = self.image_store.get(name.removesuffix(".png"))
        if image is None:
            raise Refused(404, "there is no image of this name, or no more")
        headers = {"cache-control": "private, max-age=600", "x-content-type-options": "nosniff"}
        return Response(image, media_type="image/png", headers=headers | {"content-security-policy": "sandbox"})

    async def models(self) -> Models:
        return Models(data=[Model(id=name, created=self.started) for name in dict.fromkeys((self.name, ALIAS))])

    async def model(self, name: str) -> Model:
        if name not in (self.name, ALIAS):
            raise Refused(404, f"The model {name[:100]!r} does not exist", "model", "model_not_found")
        return Model(id=name, created=self.started)

    async def health(self) -> dict[str, str]:
        if not self.worker.alive:
            raise Refused(503, "the server is shutting down")
        return {"status": "ok"}

    async def measured(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # ------------------------------------------------------------------------------------------ what they share

    def _size(self, asked: Any) -> tuple[int, int]:
        """The side of the answer, and of what is drawn for it: 512 is the 1024 image reduced."""
        if asked.model not in (None, self.name, ALIAS):
            say = f"The model {asked.model[:100]!r} does not exist; there is {self.name!r}, also called {ALIAS!r}"
            raise Refused(400, say, "model", "model_not_found")
        size = wire.SIDES[asked.size] if asked.size is not None else self.pipe.sizes[-1]
        drawn = 1024 if size == 512 else size
        if drawn not in self.pipe.sizes:
            known = [s for s, side in wire.SIDES.items() if side in self.pipe.sizes]
            raise Refused(400, f"The size {asked.size} is not one of this model's: {', '.join(known)}", "size", "invalid_value")
        return size, drawn

    def _seeds(self, asked: Any) -> list[int]:
        first = asked.seed if asked.seed is not None else secrets.randbelow(2**53)
        return [first + n for n in range(asked.n or 1)]

    async def _prepared(self, prepare: Callable[..., Any], **files: UploadFile | None) -> Any:
        """What `prepare` makes, in a thread, of the images in uploads: in the queue waits this, and nothing of them."""

        def call() -> Any:
            return prepare(**{param: self._upload(file, param) for param, file in files.items() if file is not None})

        return await anyio.to_thread.run_sync(call, limiter=self._decoders)

    def _upload(self, file: UploadFile, param: str) -> Image.Image:
        """The image in an upload, square as DALL·E 2's had to be."""
        try:
            image = open_upload(file.file.read(UPLOAD_BYTES + 1), param)
        except ValueError as error:
            raise Refused(400, str(error), param, "invalid_image") from None
        if image.width != image.height:
            say = f"{param} must be square, got {image.width}x{image.height} pixels: cut or pad it first"
            raise Refused(400, say, param, "invalid_image")
        self._check(image, param)
        return image

    async def _filter(self, content: str | Image.Image, param: str | None) -> None:
        if self.settings.content_filter is not None:
            await anyio.to_thread.run_sync(self._check, content, param)

    def _check(self, content: str | Image.Image, param: str | None) -> None:
        reason = self.settings.content_filter and self.settings.content_filter(content)
        if reason:
            raise Refused(400, str(reason), param, "content_policy_violation")

    async def _draw(
        self, request: Request, asked: Any, work: Work, jobs: list, size: int, seeds: list[int], facts: dict[str, str]
    ) -> ImagesResponse:
        client, log = request.scope["client_name"], request.scope["facts"]
        log |= {"pictures": len(jobs), "size": size} | ({"prompt": facts.get("prompt")} if self.settings.log_prompts else {})
        wait = self.rate.take(client, len(jobs)) if self.rate is not None else 0
        if wait:
            say = self.rate.message(wait, len(jobs))
            if len(jobs) > self.rate.per_minute:  # however long it waits
                raise Refused(400, say, "n", "rate_limit_exceeded")
            raise Refused(429, say, code="rate_limit_exceeded", headers={"retry-after": str(wait)})
        try:
            images = await self._answers(request, client, work, jobs)
        except Refused as refused:
            if refused.status_code in (400, 429):  # nothing was drawn
                self._give_back(client, len(jobs))
            raise
        return ImagesResponse(
            created=int(time.time()),
            data=[await self._image_data(request, asked, *p, size, facts) for p in zip(images, seeds, strict=True)],
        )

    def _give_back(self, client: str, images: int) -> None:
        if self.rate is not None and images:
            self.rate.give_back(client, images)

    async def _answers(self, request: Request, client: str, work: Work, jobs: list) -> list[Image.Image]:
        """What the worker drew, unless the deadline passes or the client leaves first: then its places are freed."""
        try:
            answers = self.worker.submit(client, work, jobs)
        except Busy as busy:
            headers = {"retry-after": str(busy.retry_after)}
            raise Refused(429, f"The server is busy: {busy}.", code="queue_full", headers=headers) from None
        drawing = asyncio.gather(*map(asyncio.wrap_future, answers))
        leaving = asyncio.ensure_future(_left(request))
        try:
            async with asyncio.timeout(self.settings.deadline):
                await asyncio.wait([drawing, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                self._give_back(client, self.worker.still_wait(answers))
                raise Refused(499, "the client left")
            return drawing.result()
        except TimeoutError:
            self._give_back(client, self.worker.still_wait(answers))
            say = f"The images were not done within {self.settings.deadline:g} seconds"
            # OpenAI's client asks again after every 5xx, and the same would take as long again
            raise Refused(504, say, code="deadline_exceeded", headers={"x-should-retry": "false"}) from None
        except ValueError as error:
            raise Refused(400, str(error), code="invalid_value") from None
        finally:
            for answer in answers:
                answer.cancel()
            for task in (drawing, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _image_data(
        self, request: Request, asked: Any, image: Image.Image, seed: int, size: int, facts: dict[str, str]
    ) -> ImageData:
        await self._filter(image, None)
        facts = facts | {"seed": str(seed), "model": self.settings.model}
        data = await anyio.to_thread.run_sync(_png, image, size, facts)
        if asked.response_format == "b64_json":
            return ImageData(b64_json=base64.b64encode(data).decode("ascii"))
        base = (self.settings.public_url or str(request.base_url)).rstrip("/")
        return ImageData(url=f"{base}/v1/images/files/{self.image_store.put(data)}.png")


async def _left(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def hole(image: Image.Image, mask: Image.Image | None, size: int) -> Image.Image:
    """White where pixels are fully transparent: of `mask`, or of the image itself; else black. Raises Refused (400).

    Reduced to `size`, where a pixel that is white in part is white.
    """
    source, param = (image, "image") if mask is None else (mask, "mask")
    if source.size != image.size:
        sizes = "{}x{} and {}x{}".format(*source.size, *image.size)
        raise Refused(400, f"mask and image must have the same size, got {sizes} pixels", "mask", "invalid_image")
    clear = np.array(source.convert("RGBA"))[..., 3] == 0
    if not clear.any() or clear.all():
        say = (
            "no transparent pixels, which say what to draw anew"
            if not clear.any()
            else "only transparent pixels: nothing to keep"
        )
        raise Refused(400, f"{param} has {say}", param, "invalid_image")
    small = reduced(Image.fromarray(clear.astype(np.uint8) * 255), size, Image.Resampling.BOX).point(lambda v: 255 if v else 0)
    low, high = small.getextrema()
    if low == high:
        what = "too few transparent pixels: none to draw anew" if not high else "transparent pixels all over: none to keep"
        raise Refused(400, f"{param} has {what} is left at {size}x{size} pixels", param, "invalid_image")
    return small


def _png(image: Image.Image, size: int, facts: dict[str, str]) -> bytes:
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=png_facts(facts))
    return file.getvalue()
