"""What people do on the page, done in a browser."""

import io
import urllib.request

from conftest import seeds
from PIL import Image

DONE = "is done"


def draw(page, prompt: str, size: int = 64, button: str = "Draw") -> None:
    page.get_by_label("Prompt", exact=True).first.fill(prompt)
    page.get_by_label(str(size), exact=True).first.check()
    page.get_by_role("button", name=button, exact=True).click()


def status(page, text: str) -> None:
    page.locator(".status", has_text=text).wait_for()


def drawn(page) -> list[bytes]:
    """The files of the gallery, as the browser shows them."""
    images = page.locator("#pictures img")
    images.first.wait_for()
    return [urllib.request.urlopen(images.nth(n).get_attribute("src")).read() for n in range(images.count())]


def test_create_is_the_pipelines_picture_and_its_png_restores_the_settings(studio_address, browse, shot, tiny_model, tmp_path):
    page = browse(studio_address())
    page.get_by_label("Seed", exact=True).fill("5")
    draw(page, "a star")
    status(page, DONE)
    (file,) = drawn(page)
    with Image.open(io.BytesIO(file)) as picture:
        assert picture.tobytes() == tiny_model("a star", generator=seeds(5), size=64).images[0].tobytes()
        assert picture.text["prompt"] == "a star" and picture.text["seed"] == "5" and picture.text["model"] == "tiny"
    shot(page, "create")
    page.get_by_label("Prompt", exact=True).first.fill("something else")
    page.get_by_role("button", name="More").click()
    saved = tmp_path / "kept.png"
    saved.write_bytes(file)
    page.locator("#restore input[type=file]").set_input_files(saved)
    status(page, "restored")
    assert page.get_by_label("Prompt", exact=True).first.input_value() == "a star"
    assert page.get_by_label("Seed", exact=True).input_value() == "5"
    assert page.get_by_label("Keep the seed").is_checked()


def test_cancel_works_at_once_and_frees_the_model(studio_address, browse, slow_model, serve):
    page = browse(studio_address())
    draw(page, "a star")
    status(page, "step")
    page.get_by_role("button", name="Cancel").click()
    status(page, "Cancelled")
    worker = serve.app.state.worker
    while worker.running:
        pass
    slow_model.set()
    draw(page, "a ring")
    status(page, DONE)
