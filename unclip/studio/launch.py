"""Serving the page with Gradio's own server, or mounted into this package's; it makes no outside connections."""

import atexit
import os
import secrets
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from ..io.images import UPLOAD_BYTES

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..server.keys import Keys


def prepare() -> None:
    """To be called before Gradio is imported: turns analytics off, and sets a folder for its files, deleted at exit."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="unclip-studio-")
        os.environ["GRADIO_TEMP_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def settings() -> dict[str, Any]:
    """Gradio's settings, the same for both ways of serving the page."""
    from .layout import CSS, HEAD, theme

    return {
        "theme": theme(),
        "css": CSS,
        "head": HEAD,
        "show_error": False,
        "max_file_size": UPLOAD_BYTES,
        "allowed_paths": [],
        "enable_monitoring": False,
        "ssr_mode": False,
        "run_history": False,  # Gradio's own would write prompts into the browser's storage
        "footer_links": [],
        "mcp_server": False,
        "pwa": False,
    }


class BlockServerFunctions:
    """Answer 404 to calls of components' server functions: the page needs none, and the editor's stores all uploads."""

    def __init__(self, app: "ASGIApp"):
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/component_server"):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("Not Found", 404)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def open_page(page: Any, port: int | None, share: bool, host: str = "127.0.0.1") -> None:
    """Serve the page until interrupted; with `share` also through Gradio's tunnel, with a password.

    On loopback only requests to this machine's own names are answered; on another `host` (as a Space's 0.0.0.0) all are.
    """
    from starlette.middleware import Middleware

    from ..server.middleware import LOOPBACK, OriginCheck

    auth = None
    if share:
        auth = ("unclip", secrets.token_urlsafe(12))
        print("others can open the shared address with the name {} and the password {}".format(*auth), file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that atexit deletes the files
    options: dict[str, Any] = {"server_name": host, "server_port": port, "share": share, "auth": auth}
    middleware = [Middleware(BlockServerFunctions)]
    if host in LOOPBACK and not share:  # the tunnel has another host name, and the password protects it
        middleware.append(Middleware(OriginCheck, hosts=LOOPBACK))
    options["app_kwargs"] = {"middleware": middleware}
    try:
        page.launch(**options, strict_cors=True, quiet=True, prevent_thread_lock=True, **settings())
    except OSError as error:
        raise ValueError(str(error)) from None
    print(page.local_url, flush=True)
    page.block_thread()


def mount(app: "FastAPI", page: Any, path: str, keys: "Keys | None" = None) -> None:
    """Mount the page into the server's application; with `keys`, it asks for a key and its name at login."""
    import gradio as gr

    app.add_middleware(BlockServerFunctions)
    page.has_launched = True  # Gradio's own attribute: only if set does it check that paths are of uploaded files
    auth = None if keys is None else keys.matches
    message = "Your key's name (key-1 for a nameless one in line 1), and the key as the password." if keys is not None else None
    # without `root_path`, image URLs in the responses of unqueued handlers lack `path`
    gr.mount_gradio_app(app, page, path, server_name="127.0.0.1", root_path=path, auth=auth, auth_message=message, **settings())
