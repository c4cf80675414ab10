"""Running the server: timeouts for slow clients, logs, and a shutdown that finishes queued jobs."""

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .middleware import JSONLines

HEADER_SECONDS = 10  # for a request's headers to arrive
WRITE_SECONDS = 60  # for a client to read what was sent
CONNECTIONS = 1000
HEADER_BYTES = 32 * 1024


class Connection(H11Protocol):
    """uvicorn's connection with timeouts for receiving headers and for sending a response."""

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._limit_header_time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_header_time()

    def _limit_header_time(self) -> None:
        """Abort the connection if a request's headers take longer than `HEADER_SECONDS`."""
        idle = self.cycle is None or self.cycle.response_complete
        if not idle:
            _cancel(self._header_timer)
            self._header_timer = None
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._write_timer)
        self._write_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._header_timer)
        _cancel(self._write_timer)
        super().connection_lost(exc)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """Sets the application's `stopping` event when it begins to shut down, which ends pages' heartbeat streams."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        app.state.stopping.set()
        super().handle_exit(sig, frame)


def check_binding(host: str, keys: bool, insecure: bool) -> None:
    """Raises ValueError for an address that others can reach, unless there are keys."""
    if not keys and not insecure and not is_loopback(host):
        raise ValueError(
            f"--host {host} lets others in without a key: give --api-key-file, or --insecure if that is what you want"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises ValueError if the port is not available."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}") from None


def server(app: FastAPI, drain: float) -> Server:
    """A server for an application; on shutdown it finishes requests for up to `drain` seconds."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # the client's address is the connection's
        server_header=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=int(drain) + 1,
    )
    return Server(config)


def run(app: FastAPI, listener: socket.socket, drain: float) -> None:
    """Serve until SIGTERM or SIGINT, with JSON logs on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("unclip.server", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when all is done
    server(app, drain).run(sockets=[listener])
