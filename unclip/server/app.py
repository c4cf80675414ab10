"""The server: OpenAI's image endpoints over one model, with batching."""

import asyncio
import base64
import io
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
from .image_store import ImageStore
from .keys import Keys, Rate
from .metrics import Metrics
from .middleware import LOOPBACK, BodyLimit, EndStreamsOnShutdown, KeyCheck, OriginCheck, RequestLog
from .wire import APIError, Edit, Generation, ImageData, ImagesResponse, Model, Models, Variation
from .work import EditWork, GenerationWork, VariationWork, shrink
from .worker import Busy, Work, Worker

# (prompt, uploaded image or generated image) -> why it is refused, or None. Called in a thread.
ContentFilter = Callable[[str | Image.Image], str | None]
ALIAS = "dall-e-2"
DECODERS = 2  # requests whose uploads are decoded at the same time
MIN_QUEUE = 2 * wire.MAX_IMAGES  # a client has half of it, and the largest request must fit


@dataclass
class Settings:
    """The settings of a server.

    Attributes:
        host: The address it listens on.
        rate: In images a minute and key.
        queue: In images.
        deadline: In seconds, for a request once its body is read.
        url_seconds: How long an image can be fetched by its URL.
        body_seconds: In seconds, for a request's body to arrive.
        public_url: The server's address for clients, if it differs from the Host header.
        any_host: Accept every Host header, not only `host` and the names of loopback.
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

    def __post_init__(self) -> None:
        for name in ("deadline", "url_seconds", "body_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be more than 0 seconds, got {getattr(self, name)}")
        if self.queue < MIN_QUEUE:
            say = f"twice the images that one request may ask for, got {self.queue}"
            raise ValueError(f"queue must be at least {MIN_QUEUE}, {say}")
        if self.public_url is not None and not self.public_url.startswith(("http://", "https://")):
            raise ValueError(f"public_url must begin with http:// or https://, got {self.public_url!r}")


def create(pipe: UnCLIPPipeline, settings: Settings, login: str | None = None) -> FastAPI:
    """The application over a loaded pipeline; `login` is the path of a mounted page that asks for the key itself.

    `app.state` has the `worker` (which runs the model), the `rate` of clients, if they have one, the `metrics`, and
    `stopping`, which is set when the server begins to stop. Raises ValueError for settings out of range.
    """
    pipe.set_progress_bar_config(disable=True)
    metrics = Metrics()
    worker = Worker(settings.queue, metrics.record_batch)
    metrics.watch(worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(worker.close, settings.deadline)

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": wire.ErrorAnswer} for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 503, 504)
    }
    app = FastAPI(
        title="unclip", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors
    )  # FastAPI's documentation pages would load scripts from other servers
    app.state.worker, app.state.metrics, app.state.stopping = worker, metrics, asyncio.Event()
    app.state.rate = rate = Rate(settings.rate) if settings.rate is not None else None
    app.add_exception_handler(RequestValidationError, wire.on_invalid)
    app.add_exception_handler(HTTPException, wire.on_http_error)
    app.include_router(Endpoints(pipe, settings, worker, metrics, rate, login).router)
    app.add_middleware(EndStreamsOnShutdown, stopping=app.state.stopping)
    app.add_middleware(BodyLimit, seconds=settings.body_seconds)
    app.add_middleware(KeyCheck, keys=settings.keys, login=login)
    hosts = None if settings.any_host else LOOPBACK | {settings.host.lower()}
    app.add_middleware(OriginCheck, hosts=hosts, public=settings.public_url)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


class Outputs(NamedTuple):
    """The side of a response's images in pixels, their seeds, and the metadata of their PNGs."""

    size: int
    seeds: list[int]
    facts: dict[str, str]


class Endpoints:
    """The routes and their shared state."""

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
        self._variation_pipe: UnCLIPImageVariationPipeline | None = None
        if pipe.image_encoder is not None and pipe.feature_extractor is not None:
            self._variation_pipe = UnCLIPImageVariationPipeline.from_pipe(pipe)
        self._inpaint_pipe = UnCLIPInpaintPipeline.from_pipe(pipe)

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

    async def generations(self, body: Generation, request: Request) -> ImagesResponse:
        await self._filter(body.prompt, "prompt")
        size, drawn = self._size(body)
        seeds = self._seeds(body)
        jobs = [(body.prompt, seed) for seed in seeds]
        outputs = Outputs(size, seeds, {"prompt": body.prompt})
        return await self._respond(request, body, GenerationWork(self.pipe, drawn), jobs, outputs)

    async def variations(self, body: Annotated[Variation, Form()], request: Request) -> ImagesResponse:
        if self._variation_pipe is None:
            raise APIError(400, f"the model {self.name!r} has no image tower: it cannot vary images")
        size, drawn = self._size(body)
        pipe = self._variation_pipe
        pixels = await self._prepared(lambda image: pipe.preprocess([image]), image=body.image)
        seeds = self._seeds(body)
        jobs = [(pixels, seed) for seed in seeds]
        outputs = Outputs(size, seeds, {"variation_of": "an upload"})
        return await self._respond(request, body, VariationWork(pipe, drawn), jobs, outputs)

    async def edits(self, body: Annotated[Edit, Form()], request: Request) -> ImagesResponse:
        await self._filter(body.prompt, "prompt")
        size, drawn = self._size(body)

        def prepare(image: Image.Image, mask: Image.Image | None = None) -> tuple[Image.Image, Image.Image]:
            return shrink(on_white(image), drawn), inpainting_mask(image, mask, drawn)

        image, mask = await self._prepared(prepare, image=body.image, mask=body.mask)
        seeds = self._seeds(body)
        work = EditWork(self._inpaint_pipe, drawn, body.prompt, image, mask)
        outputs = Outputs(size, seeds, {"prompt": body.prompt, "inpaint_of": "an upload"})
        return await self._respond(request, body, work, seeds, outputs)

    async def file(self, name: str) -> Response:
        image = self.image_store.get(name.removesuffix(".png"))
        if image is None:
            raise APIError(404, "there is no image of this name, or no more")
        headers = {"cache-control": "private, max-age=600", "x-content-type-options": "nosniff"}
        return Response(image, media_type="image/png", headers=headers | {"content-security-policy": "sandbox"})

    async def models(self) -> Models:
        return Models(data=[Model(id=name, created=self.started) for name in dict.fromkeys((self.name, ALIAS))])

    async def model(self, name: str) -> Model:
        if name not in (self.name, ALIAS):
            raise APIError(404, f"The model {name[:100]!r} does not exist", "model", "model_not_found")
        return Model(id=name, created=self.started)

    async def health(self) -> dict[str, str]:
        if not self.worker.alive:
            raise APIError(503, "the server is shutting down")
        return {"status": "ok"}

    async def measured(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # ------------------------------------------------------------------------------------------ shared by the endpoints

    def _size(self, body: Any) -> tuple[int, int]:
        """The side of the response's images, and of the generated ones: 512 is a resized 1024."""
        if body.model not in (None, self.name, ALIAS):
            say = f"The model {body.model[:100]!r} does not exist; there is {self.name!r}, also called {ALIAS!r}"
            raise APIError(400, say, "model", "model_not_found")
        size = wire.SIDES[body.size] if body.size is not None else self.pipe.sizes[-1]
        drawn = 1024 if size == 512 else size
        if drawn not in self.pipe.sizes:
            known = [s for s, side in wire.SIDES.items() if side in self.pipe.sizes]
            raise APIError(400, f"The size {body.size} is not one of this model's: {', '.join(known)}", "size", "invalid_value")
        return size, drawn

    def _seeds(self, body: Any) -> list[int]:
        first = body.seed if body.seed is not None else secrets.randbelow(2**53)
        return [first + n for n in range(body.n or 1)]

    async def _prepared(self, prepare: Callable[..., Any], **files: UploadFile | None) -> Any:
        """The result of `prepare` of the uploaded images, in a thread; only this waits in the queue, not the uploads."""

        def call() -> Any:
            return prepare(**{param: self._upload(file, param) for param, file in files.items() if file is not None})

        return await anyio.to_thread.run_sync(call, limiter=self._decoders)

    def _upload(self, file: UploadFile, param: str) -> Image.Image:
        """The image in an upload, square as DALL·E 2's had to be."""
        try:
            image = open_upload(file.file.read(UPLOAD_BYTES + 1), param)
        except ValueError as error:
            raise APIError(400, str(error), param, "invalid_image") from None
        if image.width != image.height:
            say = f"{param} must be square, got {image.width}x{image.height} pixels: cut or pad it first"
            raise APIError(400, say, param, "invalid_image")
        self._check(image, param)
        return image

    async def _filter(self, content: str | Image.Image, param: str | None) -> None:
        if self.settings.content_filter is not None:
            await anyio.to_thread.run_sync(self._check, content, param)

    def _check(self, content: str | Image.Image, param: str | None) -> None:
        reason = self.settings.content_filter and self.settings.content_filter(content)
        if reason:
            raise APIError(400, str(reason), param, "content_policy_violation")

    async def _respond(self, request: Request, body: Any, work: Work, jobs: list, outputs: "Outputs") -> ImagesResponse:
        """The response with the images of `jobs`, within the client's rate."""
        client, log = request.scope["client_name"], request.scope["facts"]
        log |= {"pictures": len(jobs), "size": outputs.size}
        if self.settings.log_prompts:
            log["prompt"] = outputs.facts.get("prompt")
        if self.rate is not None and (wait := self.rate.take(client, len(jobs))):
            say = self.rate.message(wait, len(jobs))
            if len(jobs) > self.rate.per_minute:  # it would never succeed
                raise APIError(400, say, "n", "rate_limit_exceeded")
            raise APIError(429, say, code="rate_limit_exceeded", headers={"retry-after": str(wait)})
        try:
            images = await self._await_images(request, client, work, jobs)
        except APIError as refused:
            if refused.status_code in (400, 429):  # nothing was generated
                self._refund(client, len(jobs))
            raise
        return ImagesResponse(
            created=int(time.time()),
            data=[await self._image_data(request, body, image, n, outputs) for n, image in enumerate(images)],
        )

    def _refund(self, client: str, images: int) -> None:
        if self.rate is not None and images:
            self.rate.refund(client, images)

    async def _await_images(self, request: Request, client: str, work: Work, jobs: list) -> list[Image.Image]:
        """The worker's images. If the deadline passes or the client disconnects first, the jobs are cancelled."""
        try:
            answers = self.worker.submit(client, work, jobs)
        except Busy as busy:
            headers = {"retry-after": str(busy.retry_after)}
            raise APIError(429, f"The server is busy: {busy}.", code="queue_full", headers=headers) from None
        drawing: asyncio.Future = asyncio.gather(*map(asyncio.wrap_future, answers))
        leaving: asyncio.Future = asyncio.ensure_future(_disconnected(request))
        try:
            async with asyncio.timeout(self.settings.deadline):
                await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                self._refund(client, self.worker.count_waiting(answers))
                raise APIError(499, "the client left")
            return drawing.result()
        except TimeoutError:
            self._refund(client, self.worker.count_waiting(answers))
            say = f"The images were not done within {self.settings.deadline:g} seconds"
            # OpenAI's client would retry after a 5xx, and the retry would take as long
            raise APIError(504, say, code="deadline_exceeded", headers={"x-should-retry": "false"}) from None
        except ValueError as error:
            raise APIError(400, str(error), code="invalid_value") from None
        finally:
            for answer in answers:
                answer.cancel()
            for task in (drawing, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _image_data(self, request: Request, body: Any, image: Image.Image, n: int, outputs: "Outputs") -> ImageData:
        await self._filter(image, None)
        facts = outputs.facts | {"seed": str(outputs.seeds[n]), "model": self.settings.model}
        data = await anyio.to_thread.run_sync(_png, image, outputs.size, facts)
        if body.response_format == "b64_json":
            return ImageData(b64_json=base64.b64encode(data).decode("ascii"))
        base = (self.settings.public_url or str(request.base_url)).rstrip("/")
        return ImageData(url=f"{base}/v1/images/files/{self.image_store.put(data)}.png")


async def _disconnected(request: Request) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def inpainting_mask(image: Image.Image, mask: Image.Image | None, size: int) -> Image.Image:
    """The mask: white where pixels of `mask`, or else of the image, are fully transparent; black elsewhere.

    Resized to `size`, where a pixel that is partly white is white. Raises APIError (400).
    """
    source, param = (image, "image") if mask is None else (mask, "mask")
    if source.size != image.size:
        sizes = "{}x{} and {}x{}".format(*source.size, *image.size)
        raise APIError(400, f"mask and image must have the same size, got {sizes} pixels", "mask", "invalid_image")
    clear = np.array(source.convert("RGBA"))[..., 3] == 0
    if not clear.any() or clear.all():
        say = (
            "no transparent pixels, which say what to draw anew"
            if not clear.any()
            else "only transparent pixels: nothing to keep"
        )
        raise APIError(400, f"{param} has {say}", param, "invalid_image")
    small = shrink(Image.fromarray(clear.astype(np.uint8) * 255), size, Image.Resampling.BOX).point(lambda v: 255 if v else 0)
    low, high = small.getextrema()
    if low == high:
        what = "too few transparent pixels: none to draw anew" if not high else "transparent pixels all over: none to keep"
        raise APIError(400, f"{param} has {what} is left at {size}x{size} pixels", param, "invalid_image")
    return small


def _png(image: Image.Image, size: int, facts: dict[str, str]) -> bytes:
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=png_facts(facts))
    return file.getvalue()
