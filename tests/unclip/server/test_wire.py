"""The wire format, spoken by OpenAI's own client over loopback."""

import base64
import http.client
import io
import json
import logging
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import seeds
from drawing import png
from PIL import Image

openai = pytest.importorskip("openai")

from unclip import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline  # noqa: E402
from unclip.server.middleware import JSONLines  # noqa: E402
from unclip.server.worker import FunctionWork  # noqa: E402


def client(address: str, key: str = "none", **kwargs):
    return openai.OpenAI(api_key=key, base_url=f"{address}/v1", **({"max_retries": 0} | kwargs))


def images(answer) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(p.b64_json))) for p in answer.data]


B64 = {"response_format": "b64_json"}


def test_generations_are_the_pipelines_own_images(serve, tiny_model):
    ai = client(serve())
    answer = ai.images.generate(prompt="a ring", n=2, size="64x64", model="dall-e-2", extra_body={"seed": 5}, **B64)
    drawn = images(answer)
    ours = tiny_model(["a ring"] * 2, generator=seeds(5, 6), size=64).images
    assert [p.tobytes() for p in drawn] == [p.tobytes() for p in ours]
    assert drawn[1].text["prompt"] == "a ring" and drawn[1].text["seed"] == "6"
    assert answer.created > 1_600_000_000 and answer.data[0].url is None


def test_512_is_the_1024_image_reduced_and_1024_is_the_default(serve):
    ai = client(serve())
    (large,) = images(ai.images.generate(prompt="a ring", extra_body={"seed": 1}, **B64))
    (middle,) = images(ai.images.generate(prompt="a ring", size="512x512", extra_body={"seed": 1}, **B64))
    assert large.size == (1024, 1024)
    assert middle.tobytes() == large.resize((512, 512), Image.Resampling.LANCZOS).tobytes()


def test_a_url_leads_to_the_image_once_it_was_asked_for_and_not_for_ever(serve):
    address = serve(url_seconds=0.5, model="tiny")
    answer = client(address).images.generate(prompt="a ring", size="64x64", model="tiny")
    url = answer.data[0].url
    assert url.startswith(f"{address}/v1/images/files/") and len(url.rsplit("/", 1)[1]) == 43 + len(".png")
    with urllib.request.urlopen(url) as got:
        assert got.headers["content-type"] == "image/png" and Image.open(io.BytesIO(got.read())).size == (64, 64)
    threading.Event().wait(0.6)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url)


def test_variations_and_edits(serve):
    ai = client(serve())
    for file in (png(), ("x.jpg", png(format="PNG"), "image/jpeg")):  # told by content, not name
        varied = images(ai.images.create_variation(image=file, n=2, size="64x64", extra_body={"seed": 3}, **B64))
        assert len({p.tobytes() for p in varied}) == 2 and varied[0].size == (64, 64)
    image = png((256, 256), hole=(0, 0, 128, 256))
    edited = images(ai.images.edit(image=image, prompt="a blue ring", n=2, size="256x256", extra_body={"seed": 3}, **B64))
    red = Image.new("RGB", (128, 256), "red").tobytes()
    for result in edited:
        assert result.crop((128, 0, 256, 256)).tobytes() == red, "what is not transparent is kept to the pixel"
        assert result.crop((0, 0, 128, 256)).tobytes() != red
    masked = ai.images.edit(image=png((256, 256)), mask=image, prompt="a blue ring", size="256x256", **B64)
    assert images(masked)[0].crop((128, 0, 256, 256)).tobytes() == red
    ai.images.edit(image=image, prompt="a blue ring", size="256x256", quality="standard")
    with pytest.raises(openai.BadRequestError, match="'image': give one image, not a list of them"):
        ai.images.edit(image=[image], prompt="a blue ring", size="256x256")


def test_uploads_are_reduced_off_the_event_loop_and_that_changes_no_image(serve, tiny_model, monkeypatch):
    """What waits for the model is what it draws of: the image tower's input, or image and mask of the size asked for."""
    monkeypatch.setattr("unclip.pipelines.inpaint.REPAINTING_STEPS", 2)
    ai = client(serve())
    worker, loop = serve.app.state.worker, serve.started[0][1].ident
    submit, waited, at = worker.submit, [], set()
    monkeypatch.setattr(worker, "submit", lambda *given: waited.append(given[1:]) or submit(*given))
    for name in ("load", "convert", "resize"):
        original = getattr(Image.Image, name)

        def noted(*args, original=original, **kwargs):
            at.add(threading.get_ident())
            return original(*args, **kwargs)

        monkeypatch.setattr(Image.Image, name, noted)

    speckled = np.array(Image.effect_noise((100, 100), 80).convert("RGBA"))
    speckled[40:57, 10:90, 3], speckled[98, 98, 3] = 0, 0
    speckled[:, 70:, 3] //= 2
    image, file = Image.fromarray(speckled), io.BytesIO()
    image.save(file, "PNG")
    mask = Image.fromarray((speckled[..., 3] == 0).astype(np.uint8) * 255)
    varying, repainting = (c.from_pipe(tiny_model) for c in (UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline))
    at.clear()
    for size in (64, 256):
        given = {"size": f"{size}x{size}", "extra_body": {"seed": 5}, **B64}
        (edited,) = images(ai.images.edit(image=file.getvalue(), prompt="a ring", **given))
        work, _ = waited.pop()
        assert work.image.size == work.mask.size == (min(size, 100),) * 2
        ours = repainting("a ring", image, mask, generator=seeds(5), size=size).images[0]
        assert edited.tobytes() == ours.tobytes(), size
    (varied,) = images(ai.images.create_variation(image=file.getvalue(), size="64x64", extra_body={"seed": 5}, **B64))
    ((pixels, _),) = waited.pop()[1]
    assert pixels.shape == (1, 3, 64, 64)
    assert varied.tobytes() == varying(image, generator=seeds(5), size=64).images[0].tobytes()
    assert at and loop not in at


def test_models(serve):
    ai = client(serve())
    assert [m.id for m in ai.models.list()] == ["tiny", "dall-e-2"]
    assert ai.models.retrieve("tiny").owned_by == "unclip"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ai.models.retrieve("gpt-image-1")


BAD = [
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": "  "}, "prompt", "invalid_value"),
    ({"prompt": "a" * 1001}, "prompt", "invalid_value"),
    ({"prompt": openai.omit}, "prompt", "missing_required_parameter"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 11}, "n", "invalid_value"),
    ({"n": "2"}, "n", "invalid_value"),
    ({"n": 1.5}, "n", "invalid_value"),
    ({"size": "100x100"}, "size", "invalid_value"),
    ({"size": 64}, "size", "invalid_value"),
    ({"response_format": "tiff"}, "response_format", "invalid_value"),
    ({"model": "dall-e-3"}, "model", "model_not_found"),
    ({"extra_body": {"seed": -1}}, "seed", "invalid_value"),
    ({"extra_body": {"seed": 2**63}}, "seed", "invalid_value"),
    ({"style": "vivid"}, "style", "unknown_parameter"),
]


def test_invalid_values_are_400_in_openais_shape(serve):
    ai = client(serve())
    for given, param, code in BAD:
        with pytest.raises(openai.BadRequestError) as caught:
            ai.images.generate(**({"prompt": "a ring"} | given))
        error = caught.value
        assert (error.param, error.code, error.type) == (param, code, "invalid_request_error"), given
        assert error.request_id.startswith("req_")


BAD_UPLOADS = [
    ("variation", {"image": b"not an image"}, "image", "not an image"),
    ("variation", {"image": b""}, "image", "not an image"),
    ("variation", {"image": png()[:60]}, "image", "damaged"),
    ("variation", {"image": png((64, 32))}, "image", "square, got 64x32"),
    ("variation", {"image": png(), "n": 11}, "n", "less than or equal to 10"),
    ("variation", {"image": png(format="TIFF")}, "image", "PNG, JPEG, WEBP"),
    ("edit", {"image": png()}, "image", "no transparent pixels"),
    ("edit", {"image": png(hole=(0, 0, 64, 64))}, "image", "only transparent"),
    ("edit", {"image": png((2048, 2048), hole=(8, 8, 9, 9)), "size": "64x64"}, "image", "none to draw anew is left at 64x64"),
    ("edit", {"image": png((256, 256), hole=(0, 0, 256, 255)), "size": "64x64"}, "image", "none to keep is left at 64x64"),
    ("edit", {"image": png(), "mask": png((32, 32), hole=(0, 0, 9, 9))}, "mask", "64x64|32x32"),
    ("edit", {"image": png(), "mask": b"zzz"}, "mask", "not an image"),
    ("edit", {"image": png(hole=(0, 0, 9, 9)), "prompt": " "}, "prompt", "pattern"),
    ("edit", {"image": png(hole=(0, 0, 9, 9)), "size": "1x1"}, "size", "1x1"),
]


def test_invalid_uploads_are_400_in_openais_shape(serve):
    ai = client(serve())
    for endpoint, given, param, message in BAD_UPLOADS:
        call = ai.images.create_variation if endpoint == "variation" else ai.images.edit
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            call(**(({"prompt": "a ring"} if endpoint == "edit" else {}) | given))
        assert caught.value.param == param, given


def test_what_is_no_endpoint_or_no_method_of_it_has_the_same_shape(serve):
    ai = client(serve())
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(model="tiny", messages=[])
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.APIStatusError, match="Method Not Allowed"):
        ai.get("/images/generations", cast_to=object)


def test_keys_are_wanted_everywhere_but_for_health(serve, tmp_path):
    from unclip.server import Keys

    file = tmp_path / "keys"
    file.write_text("# ours\nalice sk-alice-0123456789\nsk-nameless-0123456789  # second\n")
    file.chmod(0o600)
    address = serve(keys=Keys(file), any_host=True)
    assert len(client(address, "sk-alice-0123456789").models.list().data) == 2
    assert len(client(address, "sk-nameless-0123456789").models.list().data) == 2
    for call in (lambda ai: ai.models.list(), lambda ai: ai.images.generate(prompt="a ring")):
        with pytest.raises(openai.AuthenticationError) as caught:
            call(client(address, "sk-alice-012345678"))
        assert caught.value.code == "invalid_api_key"
    assert urllib.request.urlopen(f"{address}/healthz").status == 200
    for path in ("/metrics", "/openapi.json", "/v1/models", "/nowhere", "/"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address + path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("short", "line 1: a key has at least 16"),
        ("ok sk-0123456789abcdef\nsk-0123456789abcdef", "line 2: this key"),
        ("a b sk-0123456789abcdef", "got 3 words"),
    ],
)
def test_bad_key_files_are_named_and_their_keys_are_not(text, message, tmp_path):
    from unclip.server import Keys

    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ValueError, match=message) as caught:
        Keys(file)
    assert "0123456789" not in str(caught.value)
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        Keys(file)


def test_the_rate_is_each_keys_own_and_says_when_to_come_back(serve, tmp_path):
    from unclip.server import Keys
    from unclip.server.keys import Rate

    file = tmp_path / "keys"
    file.write_text("a sk-aaaaaaaaaaaaaaaa\nb sk-bbbbbbbbbbbbbbbb")
    file.chmod(0o600)
    address = serve(keys=Keys(file), rate=2, any_host=True)
    a, b = client(address, "sk-aaaaaaaaaaaaaaaa"), client(address, "sk-bbbbbbbbbbbbbbbb")
    a.images.generate(prompt="a ring", size="64x64", n=2)
    with pytest.raises(openai.RateLimitError) as caught:
        a.images.generate(prompt="a ring", size="64x64")
    assert caught.value.code == "rate_limit_exceeded" and 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    b.images.generate(prompt="a ring", size="64x64")
    with pytest.raises(openai.BadRequestError, match="3 images are more than the 2 a minute"):  # waiting would not help
        b.images.generate(prompt="a ring", size="64x64", n=3)

    now = [0.0]
    rate = Rate(6, clock=lambda: now[0])
    assert rate.take("x", 6) == 0 and rate.take("x", 1) == 10
    now[0] = 10.0
    assert rate.take("x", 1) == 0 and rate.take("x", 1) == 10
    rate.refund("x", 1)
    assert rate.take("x", 1) == 0 and rate.take("x", 1) == 10
    now[0] = 600.0
    rate.refund("x", 1)
    assert rate.take("x", 7) > 0 and rate.take("x", 6) == 0 and rate.take("x", 1) == 10, "never more than its all"


def test_refused_requests_do_not_count_on_the_rate(serve):
    """Neither those that the server refuses itself, nor those that the pipeline does, when their turn comes."""
    ai = client(serve(rate=2))
    hidden = png((2048, 2048), hole=(8, 8, 9, 9))  # gone at 64 pixels
    for call, given in (
        (ai.images.create_variation, {"image": b"not an image"}),
        (ai.images.edit, {"image": hidden, "prompt": "a ring"}),
        (ai.images.generate, {"prompt": "\x1c"}),  # blank to the pipeline alone
    ):
        with pytest.raises(openai.BadRequestError):
            call(n=2, size="64x64", **given)
    assert len(ai.images.generate(prompt="a ring", n=2, size="64x64").data) == 2
    with pytest.raises(openai.RateLimitError):
        ai.images.generate(prompt="a ring", size="64x64")


def test_requests_are_drawn_in_batches(serve, slow_model):
    address = serve()
    ai = client(address)
    answers = {}

    def ask(seed: int) -> None:
        answers[seed] = ai.images.generate(prompt=f"ring {seed}", size="64x64", extra_body={"seed": seed}, **B64)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(5)]
    threads[0].start()
    assert slow_model.begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    while serve.app.state.worker.waiting < 4:
        time.sleep(0.005)
    slow_model.set()
    for thread in threads:
        thread.join(60)
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    assert "unclip_batch_pictures_count 2.0" in text and "unclip_batch_pictures_sum 5.0" in text
    assert 'unclip_pictures_total{operation="generations"} 5.0' in text
    assert 'unclip_requests_total{method="POST",path="/v1/images/generations",status="200"} 5.0' in text
    assert len({images(a)[0].tobytes() for a in answers.values()}) == 5


def test_a_full_queue_is_429_and_counts_on_no_rate(serve, slow_model):
    """The smallest queue there can be still takes the largest request there can be."""
    ai = client(serve(queue=20, rate=30))
    worker, drawn = serve.app.state.worker, []

    def ask() -> None:
        drawn.append(ai.images.generate(prompt="a ring", size="64x64", n=10))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert slow_model.begun.wait(60)
    threads[1].start()
    while worker.waiting < 10:
        time.sleep(0.005)
    for _ in range(2):
        with pytest.raises(openai.RateLimitError, match="busy") as caught:
            ai.images.generate(prompt="a ring", size="64x64", n=10)
        assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1
    slow_model.set()
    for thread in threads:
        thread.join(60)
    assert [len(answer.data) for answer in drawn] == [10, 10]


def test_a_passed_deadline_is_504(serve, slow_model):
    ai = client(serve(deadline=0.4))
    with pytest.raises(openai.InternalServerError, match="0.4 seconds") as late:
        ai.images.generate(prompt="a ring", size="64x64")
    assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"
    worker = serve.app.state.worker
    while worker.running:  # the model is free again, though its gate is still closed
        time.sleep(0.005)
    assert worker.waiting == 0


def test_what_never_left_the_queue_is_not_charged_and_not_asked_for_again(serve):
    ai = client(serve(deadline=0.5, rate=4)).with_options(max_retries=2)
    worker, free, asked = serve.app.state.worker, threading.Event(), []
    (holding,) = worker.submit("somebody", FunctionWork("holding"), [lambda is_wanted: free.wait(30)])
    submit = worker.submit
    worker.submit = lambda *given: asked.append(given) or submit(*given)
    with pytest.raises(openai.InternalServerError, match="0.5 seconds"):
        ai.images.generate(prompt="a ring", size="64x64", n=3)
    free.set()
    holding.result(30)
    assert len(asked) == 1, "what took too long takes as long again"
    assert serve.app.state.rate.take("127.0.0.1", 4) == 0


def test_a_client_that_leaves_frees_its_places(serve, slow_model):
    address = serve()
    worker = serve.app.state.worker
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    body = json.dumps({"prompt": "a ring", "size": "64x64", "n": 10})
    connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    assert slow_model.begun.wait(60) and worker.running == 10
    connection.close()
    while worker.running or worker.waiting:
        time.sleep(0.005)
    assert slow_model.steps == [20], "it stopped after the step it was at: two candidates for each of ten images"


def test_stopping_lets_what_was_asked_be_drawn(serve, slow_model):
    ai = client(serve())
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ai.images.generate(prompt="a ring", size="64x64")))
    asking.start()
    assert slow_model.begun.wait(30)
    serve.stop()
    time.sleep(0.3)
    with pytest.raises(openai.APIConnectionError):
        ai.models.list()
    slow_model.set()
    asking.join(60)
    assert len(answers[0].data) == 1


def test_a_content_filter_sees_prompts_uploads_and_drawn_images(serve):
    seen = []

    def content_filter(content) -> str | None:
        seen.append(content if isinstance(content, str) else content.mode)
        return "no rings here" if "ring" in str(content) else None

    ai = client(serve(content_filter=content_filter))
    with pytest.raises(openai.BadRequestError, match="no rings here") as caught:
        ai.images.generate(prompt="a ring")
    assert caught.value.code == "content_policy_violation" and caught.value.param == "prompt"
    ai.images.edit(prompt="a star", image=png(hole=(0, 0, 9, 9)), size="64x64")
    assert seen == ["a ring", "a star", "RGBA", "RGB"]


def eventually(found, seconds: float = 10.0):
    """What `found` answers once it answers: a request is logged when its answer has gone out already."""
    deadline = time.monotonic() + seconds
    while not (answer := found()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert answer
    return answer


def test_logs_have_ids_and_no_prompts(serve, caplog):
    caplog.set_level(logging.INFO, "unclip.server")
    secret = "xylophone " * 40  # longer than the text tower reads: the pipeline warns, and quotes what it cut off
    answer = client(serve()).images.with_raw_response.generate(prompt=secret, size="64x64")

    def lines() -> list[dict]:
        return [json.loads(JSONLines().format(r)) for r in list(caplog.records) if r.name.startswith("unclip")]

    def request() -> dict | None:
        return next((x for x in lines() if x.get("request") == answer.headers["x-request-id"]), None)

    line = eventually(request)
    assert line["status"] == 200 and line["path"] == "/v1/images/generations" and line["pictures"] == 1
    assert any("longer than" in x["message"] for x in lines())
    assert "xylophone" not in json.dumps(lines())
    caplog.clear()
    client(serve(log_prompts=True)).images.generate(prompt="a ring", size="64x64")
    assert eventually(lambda: any(getattr(r, "facts", {}).get("prompt") == "a ring" for r in list(caplog.records)))


def test_an_unforeseen_failure_is_500_in_openais_shape_and_says_nothing_of_the_prompt(serve, monkeypatch, caplog):
    address = serve()

    def broken(*args, **kwargs):
        raise KeyError("a secret prompt")

    monkeypatch.setattr(type(serve.app.state.worker), "submit", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        client(address).images.generate(prompt="a secret prompt")
    assert caught.value.type == "server_error" and "secret" not in str(caught.value)
    line = next(JSONLines().format(r) for r in caplog.records if r.name == "unclip.server" and r.levelno >= logging.ERROR)
    assert "KeyError" in line and "broken" in line and "secret" not in line


def test_one_image_alone_and_in_company_is_the_same(serve, slow_model, tiny_model):
    """Coalescing changes nothing that a client sees."""
    slow_model.set()
    ai = client(serve())
    (alone,) = images(ai.images.generate(prompt="a star", size="64x64", extra_body={"seed": 9}, **B64))
    company = tiny_model(["a ring", "a star"], generator=seeds(1, 9), size=64, output_type="pt").images
    given = torch.from_numpy(np.array(alone)).permute(2, 0, 1) / 255
    assert (company[1] - given).abs().max() <= 1 / 255
