"""The studio's handlers and Gradio's own endpoints, without a browser."""

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import gradio as gr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip.images import png_facts
from unclip.studio.drawing import Step, Studio
from unclip.studio.page import MAX_SEED, between, restored, to_repaint, whole

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
