"""ASGI middleware: request ids and logs, checks of Host, Origin and key, limits of a body's size and time."""

import asyncio
import json
import logging
import secrets
import time
import traceback
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import Keys
from .wire import APIError, error_answer

logger = logging.getLogger("unclip.server")

BODY_BYTES = 24 * 2**20  # two uploads and their envelope
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
NO_KEY_PATHS = ("/healthz", "/v1/images/files/")  # the names of images are secrets themselves


class JSONLines(logging.Formatter):
    """One JSON object a line. Other modules' messages are logged without their values, which may be user input."""

    def format(self, record: logging.LogRecord) -> str:
        own = record.name.startswith("unclip.server")
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage() if own or record.name.startswith("uvicorn") else str(record.msg)
        line |= getattr(record, "facts", {})
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            line["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-8:]]
        return json.dumps(line, ensure_ascii=False)


class RequestLog:
    """A request id for each request, one line in the log, and OpenAI's error format for unexpected errors.

    Endpoints add fields of the line to `scope["facts"]`; paths are logged as in the routes.
    """

    def __init__(self, app: ASGIApp, metrics: Any):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number, started, status = f"req_{secrets.token_hex(12)}", time.monotonic(), 499  # 499: the client disconnected
        facts: dict[str, Any] = {}
        scope["facts"] = facts

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception:
            logger.error("the request failed", exc_info=True, extra={"facts": {"request": number}})
            if status == 499:
                await error_answer(500, "the server failed; its log says more under the request's id")(scope, receive, answer)
        finally:
            seconds = time.monotonic() - started
            path = facts.pop("path", None) or getattr(scope.get("route"), "path", None) or "other"
            self.metrics.record_request(scope["method"], path, status, seconds)
            line = {"request": number, "method": scope["method"][:16], "path": path, "status": status}
            logger.info("request", extra={"facts": line | {"seconds": round(seconds, 4)} | facts})


class OriginCheck:
    """Refuse requests of other origins (there is no CORS) and, unless `hosts` is None, of other Host headers.

    The first keeps other sites' pages from using this server through its user's browser; the second prevents DNS rebinding.
    `public` is the address of a reverse proxy, whose name and origin are allowed too.
    """

    def __init__(self, app: ASGIApp, hosts: set[str] | None, public: str | None = None):
        parts = urlsplit((public or "").lower())
        self.app, self.public = app, f"{parts.scheme}://{parts.netloc}" if public else None
        self.hosts = hosts if hosts is None or not public else hosts | {parts.hostname}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if self.hosts is not None and _name(f"//{host}") not in self.hosts:
                await error_answer(403, f"this server does not go by the name {host[:100]!r}")(scope, receive, send)
                return
            if origin is not None and origin.partition("://")[2].lower() != host.lower() and origin.lower() != self.public:
                await error_answer(403, f"pages of {origin[:100]!r} may not use this server")(scope, receive, send)
                return
        elif scope["type"] == "websocket":  # no endpoint supports it
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


class KeyCheck:
    """Require `Authorization: Bearer KEY`, except for `NO_KEY_PATHS` and below `login`, which asks for the key itself."""

    def __init__(self, app: ASGIApp, keys: Keys | None, login: str | None):
        self.app, self.keys, self.login = app, keys, login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["client_name"] = scope["client"][0] if scope.get("client") else "unknown"
            path = scope["path"]
            is_free = path.startswith(NO_KEY_PATHS) or (self.login is not None and (path == "/" or _below(path, self.login)))
            if self.keys is not None and not is_free:
                scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
                owner = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
                if owner is None:
                    problem = "Incorrect API key provided." if key else "You didn't provide an API key."
                    say = f"{problem} Send it as: Authorization: Bearer YOUR_KEY"
                    headers = {"www-authenticate": "Bearer"}
                    await error_answer(401, say, code="invalid_api_key", headers=headers)(scope, receive, send)
                    return
                scope["client_name"] = owner
            scope["facts"]["client"] = scope["client_name"]
        await self.app(scope, receive, send)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


class EndStreamsOnShutdown:
    """End heartbeat streams of pages once `stopping` is set; they would keep the server from stopping."""

    def __init__(self, app: ASGIApp, stopping: asyncio.Event):
        self.app, self.stopping = app, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "/heartbeat/" not in scope["path"]:
            await self.app(scope, receive, send)
            return
        is_open = False  # a response has begun and has not ended

        async def send_and_track(message: Message) -> None:
            nonlocal is_open
            is_open = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        tasks = [asyncio.ensure_future(self.app(scope, receive, send_and_track)), asyncio.ensure_future(self.stopping.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        if is_open:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class BodyLimit:
    """Answer 413 to a body of more than `size` bytes, 408 to one that takes more than `seconds` to arrive."""

    def __init__(self, app: ASGIApp, seconds: float, size: int = BODY_BYTES):
        self.app, self.size, self.seconds = app, size, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or len(length) > 18:
            await error_answer(400, "the header content-length is not a number")(scope, receive, send)
            return
        too_large = f"the request's body has more than {self.size // 2**20} MiB"
        if int(length) > self.size:
            await error_answer(413, too_large, headers={"connection": "close"})(scope, receive, send)
            return
        read, is_complete, deadline = 0, False, asyncio.get_running_loop().time() + self.seconds

        async def bounded() -> Message:
            nonlocal read, is_complete
            if is_complete:  # only a disconnect can follow
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                say = f"the request's body did not arrive within {self.seconds:g} seconds"
                raise APIError(408, say, headers={"connection": "close"}) from None
            read += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if read > self.size:
                raise APIError(413, too_large, headers={"connection": "close"})
            return message

        await self.app(scope, bounded, send)
