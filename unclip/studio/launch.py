"""Opening the page: alone with Gradio's own server, or mounted beside ours; nothing leaves the machine either way."""

import atexit
import os
import secrets
import shutil
import signal
import sys
import tempfile
from typing import Any

from ..io.images import UPLOAD_BYTES


def prepare() -> None:
    """Before Gradio is imported: no analytics, a folder for its files that is deleted at the end."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="unclip-studio-")
        os.environ["GRADIO_TEMP_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def settings() -> dict[str, Any]:
    """What both ways of opening the page are given."""
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


class NoServerFunctions:
    """Answers 404 to calls of components' server functions: the page uses none, and the editor's keeps all that it is sent."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/component_server"):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("Not Found", 404)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def open_page(page, port: int | None, share: bool) -> None:
    """Serve the page on loopback until interrupted; with `share`, through Gradio's tunnel too, behind a password."""
    from starlette.middleware import Middleware

    from ..server.guard import LOOPBACK, OwnPages

    auth = None
    if share:
        auth = ("unclip", secrets.token_urlsafe(12))
        print("others can open the shared address with the name {} and the password {}".format(*auth), file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # its files are deleted at an orderly end only
    where = {"server_name": "127.0.0.1", "server_port": port, "share": share, "auth": auth}
    middleware = [Middleware(NoServerFunctions)]
    if not share:  # the tunnel's name is its own, and behind the password
        middleware.append(Middleware(OwnPages, hosts=LOOPBACK))
    where["app_kwargs"] = {"middleware": middleware}
    try:
        page.launch(**where, strict_cors=True, quiet=True, prevent_thread_lock=True, **settings())
    except OSError as error:
        raise ValueError(str(error)) from None
    print(page.local_url, flush=True)
    page.block_thread()


def mount(app, page, path: str, keys=None) -> None:
    """Put the page beside the server's endpoints; with `keys`, it asks for one of them and its name at login."""
    import gradio as gr

    app.add_middleware(NoServerFunctions)
    page.has_launched = True  # only then does Gradio check that a path it is sent is one that was uploaded
    auth = None if keys is None else keys.opens
    message = "Your key's name (key-1 for a nameless one in line 1), and the key as the password." if keys is not None else None
    # without `root_path`, what handlers outside its queue answer has images' addresses that lack `path`
    gr.mount_gradio_app(app, page, path, server_name="127.0.0.1", root_path=path, auth=auth, auth_message=message, **settings())
