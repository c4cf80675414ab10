"""The studio's handlers and Gradio's own endpoints, without a browser."""

import asyncio
import base64
import html
import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
import pytest
import torch
from asking import ask
from conftest import ROOT
from drawing import png
from gradio.components.image_editor import EditorData
from gradio.data_classes import FileData, ImageData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip.clip.search import Index
from unclip.io.images import png_facts
from unclip.studio.generation import OWN, Exploration, Step, Studio, to_images
from unclip.studio.history import SessionHistories
from unclip.studio.layout import Page
from unclip.studio.validation import MAX_SEED, RESTORED, inpainting_inputs, number_between, restored, whole_number

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.text(max_size=5), st.floats(), st.integers(), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=50)
@given(ANYTHING)
def test_numbers_are_in_bounds_or_refused(value):
    for check in (whole_number, number_between):
        try:
            found = check("number", value, 1, 8)
        except gr.Error as error:
            assert repr(value) in error.message
        else:
            assert 1 <= found <= 8 and found == value and (check is number_between or isinstance(found, int))


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["seed", "steps", "guidance", "prompt"]), st.text(max_size=20)))
def test_restored_settings_fit_their_fields(facts):
    seed, steps = restored(facts, "seed", int), restored(facts, "steps", int)
    guidance = restored(facts, "guidance", float)
    assert seed is None or 0 <= seed <= MAX_SEED
    assert steps is None or 1 <= steps <= 100
    assert guidance is None or 1 <= guidance <= 20
    assert restored(facts, "prompt", str) == facts.get("prompt")


def test_what_is_repainted_is_what_was_painted_the_rectangle_and_the_new_space():
    image = Image.new("RGB", (40, 20), "red")
    layer = Image.new("RGBA", (40, 20))
    layer.paste((255, 255, 255, 255), (0, 0, 4, 4))
    same, mask = inpainting_inputs(image, [layer], [50, 50, 25, 50], [0, 0, 0, 0])
    assert same.size == (40, 20) and mask.getbbox() == (0, 0, 30, 20)
    assert mask.histogram()[255] == 4 * 4 + 10 * 10
    wider, mask = inpainting_inputs(image, [layer], [0, 0, 0, 0], [25, 0, 0, 50])
    assert wider.size == (50, 30) and mask.histogram()[0] == 40 * 20 - 4 * 4
    with pytest.raises(ValueError, match="paint over"):
        inpainting_inputs(image, [], [10, 10, 0, 50], [0, 0, 0, 0])


def test_steps_are_told_in_order_and_images_come_early(tiny):
    studio = Studio(tiny, "tiny")
    told = []
    stream = studio.stream("me", studio.create("a star", "", [1], "ddim", size=256))
    try:
        while True:
            told.append(next(stream))
    except StopIteration as end:
        (image,) = end.value
    assert image.size == (256, 256)
    assert all(isinstance(step, Step) and step.done <= max(step.of, 1) for step in told)
    stages = list(dict.fromkeys(step.stage for step in told))
    assert stages == [s for s in ["Waiting for the model", "prior", "decoder", "upsampler_256"] if s in stages]
    shown = [step.images[0].size for step in told if step.images]
    # a step that a newer one overtakes is not told, and the last image is the answer
    assert shown and shown == sorted(shown) and set(shown) <= {(64, 64), (256, 256)}
    studio.worker.close(5)


@pytest.fixture
def every_step(monkeypatch):
    """The studio tells of every step, however late it is heard."""
    monkeypatch.setattr("unclip.studio.generation._latest", lambda events: iter(events.get, None))


@pytest.mark.usefixtures("every_step")
def test_what_comes_early_is_what_a_step_expects_of_the_image(tiny):
    """And not the noise that it is still in."""
    studio, expected = Studio(tiny, "tiny"), []

    def note(pipe, i, t, tensors):
        if pipe.stage == "decoder":
            expected.append(to_images(tensors["pred_original_sample"])[0])

    given = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
    (drawn,) = tiny(["a star"], generator=[torch.Generator().manual_seed(1)], size=64, **given).images
    shown = [step.images[0] for step in studio.stream("me", studio.create("a star", "", [1], size=64)) if step.images]
    assert [list(p.getdata()) for p in shown] == [list(p.getdata()) for p in expected]
    assert np.abs(np.asarray(shown[-1]).astype(int) - np.asarray(drawn)).max() <= 1
    studio.worker.close(5)


RED, MASK = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64))
MASK.paste(255, (0, 0, 20, 64))
FEW = {"decoder_num_inference_steps": 3}
KINDS = {
    "create": lambda studio, size: studio.create("a star", "", [1, 2], size=size),
    "vary": lambda studio, size: studio.vary(RED, [1], size=size, eta=0.5, **FEW),
    "blend": lambda studio, size: studio.blend(["a star", "a ring"], 2, 1, size=size),
    "edit": lambda studio, size: studio.edit(RED, "a star", "a ring", [0.3], 1, size=size, **FEW),
    "inpaint": lambda studio, size: studio.inpaint("a star", RED, MASK, [1], size=size, resample=1, **FEW),
    "explore": lambda studio, size: studio.explore("a star", 1, size),
}


@pytest.fixture
def timed(tiny, monkeypatch, every_step):
    """call(kind, size, cancel=None) -> at each step, the seconds left that it told and those that were; by a clock of its own.

    It is cancelled at the step of this number.
    """
    from unclip.pipelines.base import UnCLIPBase

    studio = Studio(tiny, "tiny")
    cost = {"prior": 1, "inversion": 2, "decoder": 3, "upsampler_256": 10}  # seconds a step
    now, times, on_step = [0.0], [], UnCLIPBase._on_step

    def call(kind: str, size: int, cancel: int | None = None) -> list[tuple[float | None, float]]:
        def slowly(pipe, i, t, latents, clean):
            now[0] += cost[pipe.stage]
            times.append(now[0])
            if len(times) - 1 == cancel:
                assert studio.cancel("me")
            return on_step(pipe, i, t, latents, clean)

        times.clear()
        monkeypatch.setattr(UnCLIPBase, "_on_step", slowly)
        told = [step.seconds_left for step in studio.stream("me", KINDS[kind](studio, size)) if step.of]
        while studio.worker.running:
            time.sleep(0.001)
        return [(left, times[-1] - at) for left, at in zip_longest(told, times)]

    monkeypatch.setattr("unclip.studio.generation.time", SimpleNamespace(monotonic=lambda: now[0]))
    yield call
    studio.worker.close(5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_left_is_what_a_drawing_of_this_kind_and_size_took(timed, kind):
    """Of the first one nothing is known, whatever was drawn before."""
    for size in (256, 64):
        assert {left for left, _ in timed(kind, size)} == {None}
        for left, true in timed(kind, size):
            assert left == pytest.approx(true), size
    assert [left for left, _ in timed(kind, 256)] == pytest.approx([true for _, true in timed(kind, 256)])


@pytest.mark.parametrize("kind", KINDS)
def test_cancelling_ends_every_kind_of_drawing_at_its_next_step(timed, kind):
    steps = len(timed(kind, 256))
    for step in range(0, steps, 2):
        assert len(timed(kind, 256, cancel=step)) == step + 1
    assert [left for left, _ in timed(kind, 256)] == pytest.approx([true for _, true in timed(kind, 256)])


def test_a_cancelled_exploration_has_no_image(tiny):
    """Else the page would show, as what was drawn, how far it got."""
    studio = Studio(tiny, "tiny")

    def ending(pipe, *step):
        pipe._interrupt = pipe.stage.startswith("upsampler")
        return {}

    ending.for_kind = lambda *what, **settings: ending
    assert studio.explore("a star", 1, 256)(ending).images == []
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


@pytest.mark.slow
@pytest.mark.parametrize("words", [["app.py"], ["-m", "unclip", "serve", "--port", "0"]], ids=["app", "serve"])
def test_sigterm_ends_it_and_its_files_are_gone(words, tiny_folder, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, *words, "--model", tiny_folder, "--dtype", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment)
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        page = address.rstrip("/") + ("/app" if "serve" in words else "/")
        assert b"unCLIP studio" in urllib.request.urlopen(page).read()
        assert [*tmp_path.glob("unclip-studio-*")]
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert not [*tmp_path.glob("unclip-studio-*")]


def test_the_page_alone_goes_by_this_machines_names_only(monkeypatch, capsys):
    """Another site that makes its own name point here would be the page's own origin (DNS rebinding)."""
    from unclip.studio.launch import open_page, prepare

    prepare()
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with gr.Blocks() as blocks:
        gr.Markdown("a page")
    statuses = {}

    def meanwhile() -> None:
        address = blocks.local_url.rstrip("/")
        port = urlsplit(address).port
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "evil.example"):
            headers = {"host": host, "origin": f"http://{host}"}
            statuses[host.partition(":")[0]] = ask(address, "GET", "/config", headers=headers)[0]
        blocks.close(verbose=False)

    monkeypatch.setattr(blocks, "block_thread", meanwhile)
    open_page(blocks, None, share=False)
    assert statuses == {"127.0.0.1": 200, "localhost": 200, "evil.example": 403}
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")


@pytest.fixture
def page(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    page = Page(Studio(tiny_model, "tiny"))
    yield page
    page.studio.worker.close(5)


def last(shown) -> tuple[Image.Image, dict]:
    """The first image of a handler's last gallery, and its facts."""
    gallery = [step[0] for step in shown if isinstance(step[0], list)][-1]
    image = Image.open(gallery[0][0])
    image.load()
    return image, image.text


def test_every_tabs_handler_draws_and_its_pngs_say_how(page, tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(file)
    me = SimpleNamespace(session_hash="me")
    drawn, facts = last(page.handlers.on_draw("a star", "a ring", 2, 3, True, 64, 2.0, 2, "ddim", True, me))
    assert drawn.mode == "RGBA" and facts["sampler"] == "ddim" and facts["negative_prompt"] == "a ring"
    _, facts = last(page.handlers.on_vary(str(file), 1, 0.5, 64, me))
    assert facts["variation_of"] == "an upload"
    steps = list(page.handlers.on_blend(str(file), "", None, "a ring", 3, 64, me))
    assert last(steps)[1]["to"] == "a ring" and len(steps[-1][4]) == 3, "the way, for the slider"
    _, facts = last(page.handlers.on_edit(str(file), "a star", "a ring", 0.3, 64, me))
    assert facts["from"] == "a star" and facts["to"] == "a ring"

    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 20, 64))
    editor = editor_value(tmp_path, Image.open(file), layer)
    nothing = (0, 0, 0, 0)
    drawn, facts = last(page.handlers.on_paint(editor, "a star", *nothing, *nothing, 64, me))
    pixels = np.array(drawn)
    assert (pixels[:, 20:] == (255, 0, 0)).all() and (pixels[:, :20] != (255, 0, 0)).any()
    drawn, _ = last(page.handlers.on_paint(editor | {"layers": []}, "a star", 50, 0, 50, 100, *nothing, 64, me))
    assert (np.array(drawn)[:, :32] == (255, 0, 0)).all()
    steps = list(page.handlers.on_explore("a star", me))
    drawn, facts = last(steps)
    *_, candidates, film, stages = steps[-1]
    assert len(candidates) == 4 and len(film) == 3 and [p.width for p, _ in stages] == [64, 256, 1024]
    assert facts["prompt"] == "a star" and drawn.tobytes() == stages[-1][0].tobytes()
    assert page.studio._jobs == {}


def test_what_is_uploaded_is_opened_by_the_handlers_alone(page, tmp_path):
    """Gradio would open it first, and what it says of a file that is damaged or gone reaches nobody."""
    me, damaged = SimpleNamespace(session_hash="me"), tmp_path / "damaged.png"
    damaged.write_bytes(b"not an image")
    for file, said in ((damaged, "is not an image that can be read"), (tmp_path / "gone.png", "upload it again")):
        given = ImageData(path=str(file)).model_dump()
        with pytest.raises(gr.Error, match=said):
            list(page.handlers.on_vary(given, 1, 1.0, 64, me))
        editor = EditorData(background=FileData(path=str(file)), layers=[], composite=None).model_dump()
        with pytest.raises(gr.Error, match=said):
            list(page.handlers.on_paint(editor, "a star", *[0] * 8, 64, me))
    files = {component._id for component in (page.varied, page.first, page.second, page.edited, page.editor)}
    taken = [fn for fn in page.blocks.fns.values() if files & {component._id for component in fn.inputs}]
    assert len(taken) == 4 and not any(fn.preprocess for fn in taken)


@pytest.mark.parametrize("field", ["varied", "editor", "restore", "prompt"])
@pytest.mark.parametrize("file", [{"path": "http://x.org/x.png", "meta": {"_type": "gradio.FileData"}}, {"path": "/tmp/x.png"}])
def test_fields_take_uploads_alone(page, field, file):
    """Gradio looks for files in what any field is sent, but checks that they are uploads only where they are marked."""
    component = getattr(page, field)
    fn = next(fn for fn in page.blocks.fns.values() if component in fn.inputs)
    values = [{"background": file} if c is page.editor else file if c is component else None for c in fn.inputs]
    with pytest.raises(gr.Error, match="files that were uploaded"):
        asyncio.run(page.blocks.preprocess_data(fn, values, None))


def editor_value(folder, image: Image.Image, *layers: Image.Image) -> dict:
    """What Gradio passes on of an editor: files of uploads."""
    files = []
    for number, content in enumerate((image, *layers)):
        content.save(folder / f"{number}.png")
        files.append(FileData(path=str(folder / f"{number}.png")))
    return EditorData(background=files[0], layers=files[1:], composite=files[0]).model_dump()


def test_the_editor_takes_an_image_and_one_layer(page, tmp_path):
    red = Image.new("RGBA", (64, 64), "red")
    editor = editor_value(tmp_path, red, red)
    for many in (editor | {"layers": 2 * editor["layers"]}, editor | {"layers": [], "id": "kept"}, editor | {"layers": "ab"}):
        with pytest.raises(gr.Error, match="an image and one layer"):
            list(page.handlers.on_paint(many, "a star", *[0] * 8, 64, SimpleNamespace(session_hash="me")))


def test_an_upload_is_varied_through_gradios_own_endpoints(studio_address):
    """As the browser does it: the upload, then its path in the field of the tab."""
    address = studio_address()
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="red.png"\r\n\r\n' + png() + b"\r\n--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    (path,) = json.load(urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, headers)))
    config = json.load(urllib.request.urlopen(f"{address}/config"))
    varied = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "varied")
    vary = next(n for n, d in enumerate(config["dependencies"]) if d["inputs"][:1] == [varied])
    file = {"path": path, "url": f"{address}/gradio_api/file={path}", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file, 1, 1, 64], "fn_index": vary, "session_hash": "abc"}).encode()
    headers = {"content-type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/queue/join", body, headers), timeout=20)
    said = ""
    for line in urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=abc", timeout=60):
        said += line.decode()
        if "process_completed" in said or "close_stream" in said:
            break
    assert '"success":true' in said.replace(" ", "") and "done." in said, said[-2000:]


def test_functions_of_components_cannot_be_called(studio_address):
    """The editor's would keep what it is sent, whatever its size, for as long as the server runs."""
    address = studio_address()
    config = json.load(urllib.request.urlopen(f"{address}/config"))
    editor = next(c["id"] for c in config["components"] if c["type"] == "imageeditor")
    body = {
        "data": {"id": "x", "type": "composite", "index": 0},
        "fn_name": "accept_blobs",
        "component_id": editor,
        "session_hash": "x",
    }
    for path in ("component_server", "component_server/"):
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(
            f"{address}/gradio_api/{path}", json.dumps(body | {"session_hash": "x"}).encode(), headers
        )
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request, timeout=20)


def test_a_search_passes_over_what_was_deleted(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(4):
        Image.new("RGB", (64, 64), (60 * n, 0, 0)).save(folder / f"{n}.png")
    index = Index(folder, tiny_model.clip, tmp_path / "index")
    index.update()
    page = Page(Studio(tiny_model, "tiny"), index)
    (folder / "2.png").unlink()
    images, said = page.handlers.on_find("a star", None)
    assert sorted(caption.split()[0] for _, caption in images) == ["0.png", "1.png", "3.png"] and "3 images" in said
    page.studio.worker.close(5)


def test_a_page_that_is_loaded_again_shows_its_sessions_history(page):
    token = "0123456789abcdef" * 2
    before, after = (SimpleNamespace(session_hash=name, username=None) for name in ("before", "after"))
    assert page.handlers.on_open(token, before) == []
    histories = [step[3] for step in page.handlers.on_draw("a star", "", 2, 7, True, 64, 2.0, 2, OWN, False, before)]
    (drawn,) = (history for history in histories if isinstance(history, list))
    assert [caption for _, caption in drawn] == ["seed 8, a star", "seed 7, a star"], "the newest first"
    page.handlers.on_leave(before)
    assert page.handlers.on_open(token, after) == drawn
    for stranger in (token[::-1], "", None, 3, token + "0"):
        assert page.handlers.on_open(stranger, SimpleNamespace(session_hash="stranger", username=None)) == []
    assert page.handlers.on_open(token, SimpleNamespace(session_hash="stranger", username="another key")) == []
    os.remove(drawn[0][0])  # as Gradio does after an hour
    assert page.handlers.on_open(token, after) == drawn[1:]


def test_histories_are_bounded_and_follow_a_page_into_its_session(tmp_path):
    file = str(tmp_path / "picture.png")
    Path(file).touch()
    histories = SessionHistories(images=3, sessions=2)
    for number in range(5):
        found = histories.add("one", [(file, str(number))])
    assert [caption for _, caption in found] == ["4", "3", "2"]
    histories.add("two", [(file, "")])
    histories.add("one", [(file, "5")])
    histories.add("three", [(file, "")])
    assert len(histories.of("one")) == 3 and histories.of("two") == [], "it drew longest ago"
    assert [caption for _, caption in histories.open("one", "session")] == ["5", "4", "3"], "drawn before it was told"
    histories.close("one")
    assert histories.of("one") == [] and len(histories.open("four", "session")) == 3


def test_a_trajectory_has_its_length_and_ends_with_the_image(page, monkeypatch):
    from unclip.studio import generation

    monkeypatch.setattr(generation, "TRAJECTORY", 2)
    *_, (*_, film, stages) = page.handlers.on_explore("a star", SimpleNamespace(session_hash="me"))
    assert len(film) == 2 and film[-1].tobytes() == stages[0][0].tobytes()


def test_a_trouble_while_drawing_is_told_where_the_progress_was(page, monkeypatch):
    """Not only in a message that goes away: the bar of a drawing that is over is gone, and so is its cancel button."""

    def broken(*args, **kwargs):
        raise RuntimeError("deep inside")

    monkeypatch.setattr(type(page.studio.pipe), "__call__", broken)
    shown = []
    steps = page.handlers.on_draw("a star", "", 1, 0, True, 64, 2.0, 2, OWN, False, SimpleNamespace(session_hash="me"))
    with pytest.raises(RuntimeError):
        for step in steps:
            shown.append(step)
    _, said, cancel, *_ = shown[-1]
    assert "failed" in said and "progress" not in said and "deep" not in said and not cancel.interactive


def test_with_a_content_filter_nothing_is_shown_that_it_has_not_seen(page):
    seen = []
    page.studio.content_filter = lambda content: seen.append(content) or None
    me = SimpleNamespace(session_hash="me")
    steps = list(page.handlers.on_draw("a star", "", 1, 0, True, 256, 2.0, 2, OWN, False, me))
    assert [isinstance(step[0], list) for step in steps].count(True) == 1
    assert [s if isinstance(s, str) else s.size for s in seen] == ["a star", "", (256, 256)]
    page.studio.content_filter = lambda content: None if isinstance(content, str) else "not that"
    for handler in (
        page.handlers.on_draw("a star", "", 1, 0, True, 64, 2.0, 2, OWN, False, me),
        page.handlers.on_explore("a star", me),
    ):
        shown = []
        with pytest.raises(gr.Error, match="not that"):
            for step in handler:
                shown.append(step)
        assert not any(isinstance(value, list) for step in shown for value in (step[0], *step[4:]))
        assert "not that" in shown[-1][1]


def test_restoring_says_which_settings_came_back(page, command, tiny_folder, tmp_path, serve):
    """Of the page's own images all; else which did, which the file does not say, and which have no field or none so wide."""
    me = SimpleNamespace(session_hash="me")

    def restore(file) -> tuple[list, str, bool]:
        *fields, said, lock = page.handlers.on_restore(str(file))
        fields = dict(zip(RESTORED, fields, strict=True))
        back = {name: value for name, value in fields.items() if value != gr.skip()}
        return back, re.search("<p>(.*)</p>", html.unescape(said))[1], lock

    shown = [step[0] for step in page.handlers.on_draw("a star", "a ring", 1, 3, True, 64, 2.0, 2, "ddim", True, me)]
    back, said, lock = restore(
        next(gallery for gallery in shown if isinstance(gallery, list) and isinstance(gallery[0], tuple))[0][0]
    )
    assert list(back) == list(RESTORED) and said == "The settings of that image are restored." and lock is True

    size = ("--size", "64", "--dtype", "fp32")
    assert command("generate", "a star", "--model", tiny_folder, "--out", tmp_path / "star.png", "--seed", "3", *size)[0] == 0
    back, said, lock = restore(tmp_path / "star.png")
    assert back == {"prompt": "a star", "seed": 3} and lock is True
    assert said.startswith("Restored: prompt, seed. Left as they were, for the file does not say them: negative prompt, size,")
    assert "Not to be set on this page: model '" in said

    body = json.dumps({"prompt": "a star", "size": "64x64", "seed": 2**40, "response_format": "b64_json"}).encode()
    answer = ask(serve(), body=body)[1]
    (tmp_path / "api.png").write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    back, said, lock = restore(tmp_path / "api.png")
    assert back == {"prompt": "a star"} and lock is not True
    assert said.endswith("transparent. Not to be set on this page: seed '1099511627776'.")

    RED.save(tmp_path / "edit.png", pnginfo=png_facts({"edit_of": "x.png", "sampler": "distilled", "model": "tiny"}))
    back, said, _ = restore(tmp_path / "edit.png")
    assert back == {} and said.startswith("No setting is restored. Left as they were, for the file does not say them: prompt,")
    assert said.endswith("Not to be set on this page: edit of 'x.png', sampler 'distilled'.")


def test_what_the_page_refuses_does_not_count_on_the_rate(page, tmp_path):
    from unclip.server.keys import Rate

    page.studio.rate = Rate(1)
    me = SimpleNamespace(session_hash="me", username="me", client=None)
    RED.save(tmp_path / "red.png")
    for _ in range(2):
        with pytest.raises(gr.Error, match="the same sentence, 'a star'"):
            list(page.handlers.on_edit(str(tmp_path / "red.png"), "a star", "a star", 0.3, 64, me))
    assert list(page.handlers.on_draw("a star", "", 1, 0, True, 64, 2.0, 2, OWN, False, me))
    with pytest.raises(gr.Error, match="1 images a minute"):
        list(page.handlers.on_draw("a star", "", 1, 0, True, 64, 2.0, 2, OWN, False, me))


def test_the_rate_counts_what_the_page_draws(page):
    from unclip.server.keys import Rate

    page.studio.rate = Rate(2)
    alice, bob = (SimpleNamespace(session_hash=name, username=name, client=None) for name in ("alice", "bob"))
    assert list(page.handlers.on_draw("a star", "", 2, 0, True, 64, 2.0, 2, OWN, False, alice))
    with pytest.raises(gr.Error, match="2 images a minute. Try again in"):
        list(page.handlers.on_explore("a star", alice))
    assert list(page.handlers.on_explore("a star", bob))


def test_what_a_session_draws_anew_takes_the_old_ones_place_and_its_status(page, slow_model):
    """The old one's end says nothing: the status and the cancel button are the new one's by then."""
    me = SimpleNamespace(session_hash="me")
    first = page.handlers.on_draw("a star", "", 1, 0, True, 64, 2.0, 2, OWN, False, me)
    assert next(first) and slow_model.begun.wait(30)
    second = page.handlers.on_draw("a ring", "", 1, 0, True, 64, 2.0, 2, OWN, False, me)
    assert "Waiting" in next(second)[1]
    assert not any("Cancelled" in str(step[1]) for step in first)
    slow_model.set()
    assert "done" in list(second)[-2][1]


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.data())
def fuzz(page, counts, file, data):
    """One handler with anything for its arguments, or with all but a few of them right."""
    me = SimpleNamespace(session_hash="me")
    right = {
        page.handlers.on_draw: ["a star", "", 1, 0, True, 64, 2.0, 2, OWN, False],
        page.handlers.on_vary: [None, 1, 1, 64],
        page.handlers.on_blend: [None, "a star", None, "a ring", 2, 64],
        page.handlers.on_edit: [None, "a star", "a ring", 0.3, 64],
        page.handlers.on_paint: [{"background": file, "layers": []}, "a star", *[50] * 4, *[0] * 4, 64],
        page.handlers.on_explore: ["a star"],
    }
    handler = data.draw(st.sampled_from(list(right)))
    values = list(right[handler])
    for place in data.draw(st.sets(st.integers(0, len(values) - 1), max_size=2)):
        values[place] = data.draw(ANYTHING)
    try:
        for _ in handler(*values, me):
            pass
        counts["drawn"] += 1
    except gr.Error as error:
        assert error.message and "\n" not in error.message
        counts["refused"] += 1


def test_handlers_draw_or_refuse_whatever_they_are_given(page, monkeypatch, tmp_path):
    tiny = Image.new("RGB", (8, 8))
    monkeypatch.setattr(page.studio, "explore", lambda prompt, seed, size: lambda progress: Exploration([], images=[tiny]))
    counts = Counter()
    tiny.save(tmp_path / "tiny.png")
    fuzz(page, counts, str(tmp_path / "tiny.png"))
    print(dict(counts))
    assert counts["refused"] > 50 and counts["drawn"] > 0
    assert page.studio._jobs == {}


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(value=ANYTHING)
def test_places_in_galleries_and_files_are_checked_like_numbers(page, value):
    """What Gradio passes on as the browser sent it."""
    drawn, event = [("a.png", "a"), ("b.png", "b")], SimpleNamespace(index=value)
    for call in (
        lambda: page.handlers.on_select(event),
        lambda: page.handlers.on_recall(drawn, event),
        lambda: page.handlers.on_place(["a.png", "b.png"], value),
        lambda: page.handlers.on_tick(["a.png", "b.png"], value),
        lambda: page.handlers.on_restore(value),
    ):
        try:
            call()
        except gr.Error as error:
            assert "\n" not in error.message


def test_a_page_that_listens_does_not_keep_the_server_nor_end_in_an_error(studio_address, serve, caplog):
    address = studio_address()
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    connection.request("GET", "/app/gradio_api/heartbeat/abc")
    assert connection.getresponse().read(5) == b"data:"
    started = time.monotonic()
    serve.stop()
    for _, thread in serve.started:
        thread.join(20)
    assert time.monotonic() - started < 4, "the time it would be waited for is 5 s"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_mistakes_on_the_page_are_one_line(page):
    me = SimpleNamespace(session_hash="me")
    for steps in (
        page.handlers.on_draw(" ", "", 1, 0, True, 64, 2.0, 2, OWN, False, me),
        page.handlers.on_draw("a" * 1001, "", 1, 0, True, 64, 2.0, 2, OWN, False, me),
        page.handlers.on_draw("a star", "", 9, 0, True, 64, 2.0, 2, OWN, False, me),
        page.handlers.on_draw("a star", "", 1, 0, True, 65, 2.0, 2, OWN, False, me),
        page.handlers.on_draw("a star", "", 1, 0, True, 64, 2.0, 2, "magic", False, me),
        page.handlers.on_vary(None, 1, 1, 64, me),
        page.handlers.on_paint(None, "a star", *[0] * 8, 64, me),
        page.handlers.on_draw("a star", "", 1, 0, True, 64, None, 2, OWN, False, me),
        page.handlers.on_explore("", me),
    ):
        with pytest.raises(gr.Error) as caught:
            list(steps)
        assert "\n" not in caught.value.message
