"""`unclip serve`: the model behind OpenAI's image API."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .images import load, need
from .options import Device, Dtype, Model
from .studio import Search, page

KeyFile = Annotated[
    Path | None, typer.Option(help="A file with one API key a line, or a name and a key; nothing but health goes without.")
]


def serve(  # noqa: PLR0913 - the parameters of a command are its options
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8000,
    api_key_file: KeyFile = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others in without a key.")] = False,
    rate: Annotated[int | None, typer.Option(help="Images a minute for each key; default: no limit.")] = None,
    queue: Annotated[
        int,
        typer.Option(help="Images that may wait, half of them one client's; beyond it: 429. 20 or more, for requests of 10."),
    ] = 64,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 120.0,
    url_seconds: Annotated[float, typer.Option(help="Seconds that an image asked for by URL is kept.")] = 3600.0,
    public_url: Annotated[str | None, typer.Option(help="Where clients find this server, if behind a proxy.")] = None,
    content_filter: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="May refuse prompts and images; see docs/server.md."),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    with_app: Annotated[bool, typer.Option("--app/--no-app", help="The studio beside it, at /app.")] = True,
    search: Search = None,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve OpenAI's image API (generations, edits, variations) over this model; logs go to stderr."""
    need("fastapi", "uvicorn", "multipart", "prometheus_client")
    from ..server import Keys, Settings, check_binding, create, listen, run

    check_binding(host, api_key_file is not None, insecure)
    settings = Settings(
        model=model,
        host=host,
        keys=Keys(api_key_file) if api_key_file is not None else None,
        rate=rate,
        queue=queue,
        deadline=deadline,
        url_seconds=url_seconds,
        public_url=public_url,
        any_host=insecure or api_key_file is not None,
        content_filter=_plugin(content_filter) if content_filter is not None else None,
        log_prompts=log_prompts,
    )
    if search is not None and not search.is_dir():
        raise ValueError(f"{search} is not a folder")
    if with_app:
        need("gradio")
        from ..studio.launch import mount, prepare

        prepare()
    with listen(host, port) as listener:
        pipe = load(model, device, dtype)
        app = create(pipe, settings, "/app" if with_app else None)
        if with_app:
            studio = page(pipe, model, search, app.state.worker, settings.content_filter, app.state.rate)
            mount(app, studio, "/app", settings.keys)
        address, number = listener.getsockname()[:2]
        print(f"http://{f'[{address}]' if ':' in address else address}:{number}", flush=True)
        run(app, listener, deadline)


def _plugin(name: str) -> Callable:
    """The function that `package.module:function` names. Raises ValueError if there is none."""
    import sys
    from importlib import import_module

    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # to find modules in the current folder
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--content-filter {name} cannot be imported: {error}") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise ValueError(f"--content-filter {name} is no function")
    return found
