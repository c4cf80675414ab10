"""Servers over the tiny pipeline, on loopback, in threads of this process: real sockets, real clients."""

import signal
import threading
import time

import pytest
import torch

from unclip import UnCLIPPipeline


@pytest.fixture(scope="session")
def tiny_model(tiny_folder) -> UnCLIPPipeline:
    """One pipeline for all servers; the settings of a call are its own."""
    return UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture
def serve(tiny_model):
    """call(page=None, **settings) -> a server's address; `page(app)` mounts one. `stop()` is SIGTERM, at the end too."""
    pytest.importorskip("uvicorn")
    from unclip.server import Settings, create, listen
    from unclip.server.serving import server

    started = []

    def call(**settings) -> str:
        page = settings.pop("page", None)
        app = create(tiny_model, Settings(**({"model": "tiny", "deadline": 60.0} | settings)), "/app" if page else None)
        if page:
            page(app)
        listener = listen("127.0.0.1", 0)
        running = server(app, drain=5)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        started.append((running, thread))
        call.app = app
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.005)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def stop() -> None:
        for running, _ in started:
            running.handle_exit(signal.SIGTERM, None)

    call.stop, call.started = stop, started
    yield call
    stop()
    for _, thread in started:
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def slow_model(monkeypatch):
    """The decoder waits at each step until the returned event is set; `.begun` is set when it got there."""
    from unclip.pipelines.base import UnCLIPBase

    gate, begun = threading.Event(), threading.Event()
    gate.begun, gate.steps = begun, []
    on_step = UnCLIPBase._on_step

    def waiting(self, i, t, latents, clean):
        answer = on_step(self, i, t, latents, clean)
        gate.steps.append(len(latents))
        begun.set()
        while not gate.wait(0.005):
            on_step(self, i, t, latents, clean)
            if self._interrupt:
                break
        return answer

    monkeypatch.setattr(UnCLIPBase, "_on_step", waiting)
    yield gate
    gate.set()
