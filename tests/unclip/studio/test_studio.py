"""The studio's handlers and Gradio's own endpoints, without a browser."""

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip.images import png_facts
from unclip.studio.drawing import OWN, Step, Studio
from unclip.studio.page import MAX_SEED, Page, between, restored, to_repaint, whole

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.text(max_size=5), st.floats(), st.integers(), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=50, deadline=None)
@given(ANYTHING)
def test_numbers_are_in_bounds_or_refused(value):
    for check in (whole, between):
        try:
            found = check("number", value, 1, 8)
        except gr.Error as error:
            assert repr(value) in error.message
        else:
            assert 1 <= found <= 8 and found == value and (check is between or isinstance(found, int))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(["seed", "steps", "guidance", "prompt"]), st.text(max_size=20)))
def test_restored_settings_fit_their_fields(facts):
    seed, steps = restored(facts, "seed", int), restored(facts, "steps", int)
    guidance = restored(facts, "guidance", float)
    assert seed is None or 0 <= seed <= MAX_SEED
    assert steps is None or 1 <= steps <= 100
    assert guidance is None or 1 <= guidance <= 20
    assert restored(facts, "prompt", str) == facts.get("prompt")


def test_what_is_repainted_is_what_was_painted_the_rectangle_and_the_new_space():
    picture = Image.new("RGB", (40, 20), "red")
    layer = Image.new("RGBA", (40, 20))
    layer.paste((255, 255, 255, 255), (0, 0, 4, 4))
    same, mask = to_repaint(picture, [layer], [50, 50, 25, 50], [0, 0, 0, 0])
    assert same.size == (40, 20) and mask.getbbox() == (0, 0, 30, 20)
    assert mask.histogram()[255] == 4 * 4 + 10 * 10
    wider, mask = to_repaint(picture, [layer], [0, 0, 0, 0], [25, 0, 0, 50])
    assert wider.size == (50, 30) and mask.histogram()[0] == 40 * 20 - 4 * 4
    with pytest.raises(ValueError, match="paint over"):
        to_repaint(picture, [], [10, 10, 0, 50], [0, 0, 0, 0])


def test_steps_are_told_in_order_and_pictures_come_early(tiny):
    studio = Studio(tiny, "tiny")
    told = []
    stream = studio.stream("me", studio.create("a star", "", [1], "ddim", size=256))
    try:
        while True:
            told.append(next(stream))
    except StopIteration as end:
        (picture,) = end.value
    assert picture.size == (256, 256)
    assert all(isinstance(step, Step) and step.done <= max(step.of, 1) for step in told)
    stages = list(dict.fromkeys(step.stage for step in told))
    assert stages == [s for s in ["Waiting for the model", "prior", "decoder", "upsampler_256"] if s in stages]
    shown = [step.pictures[0].size for step in told if step.pictures]
    assert shown[-1] == (256, 256) and (len(shown) == 1 or shown[0] == (64, 64))
    studio.worker.close(5)


def test_the_mounted_page_reads_no_other_files_and_fetches_no_urls(studio_address, tmp_path):
    """What a hostile client can send to Gradio's own endpoints, without the page."""
    address = studio_address()
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret, pnginfo=png_facts({"prompt": "a secret"}))
    bait = socket.create_server(("127.0.0.1", 0))
    bait.settimeout(2)
    reached = []

    def listen() -> None:
        try:
            reached.append(bait.accept())
        except TimeoutError:
            return

    thread = threading.Thread(target=listen)
    thread.start()
    config = json.load(urllib.request.urlopen(f"{address}/config"))
    restore = next(
        i for i, d in enumerate(config["dependencies"]) if len(d["inputs"]) == 1 and any(t[1] == "upload" for t in d["targets"])
    )
    fetched = f"http://127.0.0.1:{bait.getsockname()[1]}/x.png"
    for path in (str(secret), "/etc/passwd", fetched):
        file = {"path": path, "url": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        body = {"data": [file], "fn_index": restore, "session_hash": "abc"}
        request = urllib.request.Request(
            f"{address}/gradio_api/queue/join", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        said = ""
        try:
            said = urllib.request.urlopen(request, timeout=20).read().decode()
            events = urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=abc", timeout=30)
            for line in events:
                said += line.decode()
                if "process_completed" in said or "close_stream" in said:
                    break
        except urllib.error.HTTPError as error:
            said += error.read().decode()
        assert "a secret" not in said and "root:" not in said and '"success":true' not in said.replace(" ", ""), said
    for path in ("file=/etc/passwd", "file=../../../etc/passwd", "proxy=" + fetched, "file=" + fetched):
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)  # follows nothing
        connection.request("GET", f"/app/gradio_api/{path}")
        answer = connection.getresponse()
        assert answer.status != 200 and b"root:" not in answer.read(), path
        connection.close()
    thread.join()
    bait.close()
    assert not reached


@pytest.fixture
def page(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    page = Page(Studio(tiny_model, "tiny"))
    yield page
    page.studio.worker.close(5)


def last(shown) -> tuple[Image.Image, dict]:
    """The first picture of a handler's last gallery, and its facts."""
    gallery = [step[0] for step in shown if isinstance(step[0], list)][-1]
    picture = Image.open(gallery[0][0])
    picture.load()
    return picture, picture.text


def test_every_tabs_handler_draws_and_its_pngs_say_how(page, tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(file)
    me = SimpleNamespace(session_hash="me")
    drawn, facts = last(page.on_draw("a star", "a ring", 2, 3, True, 64, 2.0, 2, "ddim", True, None, me))
    assert drawn.mode == "RGBA" and facts["sampler"] == "ddim" and facts["negative_prompt"] == "a ring"
    _, facts = last(page.on_vary(str(file), 1, 0.5, 64, [], me))
    assert facts["variation_of"] == "an upload"
    steps = list(page.on_blend(str(file), "", None, "a ring", 3, 64, [], me))
    assert last(steps)[1]["to"] == "a ring" and len(steps[-1][4]) == 3, "the way, for the slider"
    _, facts = last(page.on_edit(str(file), "a star", "a ring", 0.3, 64, [], me))
    assert facts["from"] == "a star" and facts["to"] == "a ring"

    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 20, 64))
    editor = {"background": Image.open(file), "layers": [layer], "composite": None}
    nothing = (0, 0, 0, 0)
    drawn, facts = last(page.on_paint(editor, "a star", *nothing, *nothing, 64, [], me))
    pixels = np.array(drawn)
    assert (pixels[:, 20:] == (255, 0, 0)).all() and (pixels[:, :20] != (255, 0, 0)).any()
    drawn, _ = last(page.on_paint(editor | {"layers": []}, "a star", 50, 0, 50, 100, *nothing, 64, [], me))
    assert (np.array(drawn)[:, :32] == (255, 0, 0)).all()
    *_, (_, _, candidates, film, stages) = page.on_explore("a star", me)
    assert len(candidates) == 4 and film and [p.width for p, _ in stages] == [64, 256, 1024]
    assert page.studio._jobs == {}


def test_mistakes_on_the_page_are_one_line(page):
    me = SimpleNamespace(session_hash="me")
    for steps in (
        page.on_draw(" ", "", 1, 0, True, 64, 2.0, 2, OWN, False, None, me),
        page.on_draw("a" * 1001, "", 1, 0, True, 64, 2.0, 2, OWN, False, None, me),
        page.on_draw("a star", "", 9, 0, True, 64, 2.0, 2, OWN, False, None, me),
        page.on_draw("a star", "", 1, 0, True, 65, 2.0, 2, OWN, False, None, me),
        page.on_draw("a star", "", 1, 0, True, 64, 2.0, 2, "magic", False, None, me),
        page.on_vary(None, 1, 1, 64, None, me),
        page.on_paint(None, "a star", *[0] * 8, 64, None, me),
        page.on_explore("", me),
    ):
        with pytest.raises(gr.Error) as caught:
            list(steps)
        assert "\n" not in caught.value.message
