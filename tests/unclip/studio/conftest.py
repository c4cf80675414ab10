"""The page in a real browser: Debian's Chromium, driven by Playwright; no request may leave the machine."""

import os
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
SHOTS = Path(os.environ.get("SCREENSHOTS", "out/screenshots"))


@pytest.fixture(scope="session")
def chromium():
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip("no chromium: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def studio_address(serve, tiny_model):
    """call(index=None, **settings) -> the address of a page over the tiny pipeline, mounted beside the server."""
    from unclip.studio.launch import mount, prepare

    prepare()
    from unclip.studio.generation import Studio
    from unclip.studio.layout import build

    def call(index=None, **settings) -> str:
        def page(app) -> None:
            studio = Studio(tiny_model, "tiny", app.state.worker, settings.get("content_filter"))
            mount(app, build(studio, index), "/app", settings.get("keys"))

        return serve(page=page, **settings) + "/app"

    return call


@pytest.fixture
def browse(chromium):
    """call(address, **context) -> a page of a fresh browser session. Fails at the end if anything went beyond loopback."""
    contexts, beyond = [], []

    def guard(route) -> None:
        url = route.request.url
        if url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            beyond.append(url)
            route.abort()

    def call(address: str, **kwargs):
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 1000}} | kwargs))
        contexts.append(context)
        context.route("**/*", guard)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        return page

    yield call
    for context in contexts:
        context.close()
    assert not beyond, "requests that left the machine"


@pytest.fixture
def shot():
    """Keep a screenshot: call(page, name)."""

    def call(page, name: str) -> None:
        page.wait_for_function("() => [...document.images].every(e => e.complete)")
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    return call
