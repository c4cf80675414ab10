"""Whatever the OpenAPI document allows, and much that it does not, thrown at a running server."""

import collections
import io
import json

import pytest
from asking import alive, ask, form
from drawing import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytestmark = pytest.mark.slow

often = settings(max_examples=300, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_schemathesis_finds_no_server_error(serve, mode):
    """Every answer is documented, in the documented shape, and none is a 5xx; what breaks the document is refused."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi import checks as openapi

    address = serve()
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    counts: collections.Counter[str] = collections.Counter()
    statuses: collections.Counter[int] = collections.Counter()
    checks = [
        schemathesis.checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "NEGATIVE" and not operation.body:
            continue  # nothing that could be wrong
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])

        @settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None)
        @given(case=cases)
        def check(case) -> None:
            if mode == "POSITIVE" and isinstance(case.body, dict):
                case.body |= {"n": 1, "size": "64x64"}  # what is drawn need not be large
            answer = case.call_and_validate(checks=checks)
            counts[case.operation.label] += 1
            statuses[answer.status_code] += 1

        check()
    print(mode, dict(counts), dict(statuses))
    assert sum(counts.values()) > 200
    assert alive(address)


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))
NAMES = st.sampled_from(["prompt", "n", "size", "response_format", "model", "user", "seed", "quality", "x"])


def test_any_json_is_answered_or_refused(serve):
    address, statuses = serve(), collections.Counter()

    @often
    @given(st.dictionaries(NAMES, JSON, max_size=4) | JSON, st.booleans())
    def check(body, with_prompt) -> None:
        if isinstance(body, dict) and with_prompt:
            body["prompt"] = "a ring"
        if isinstance(body, dict) and isinstance(body.get("prompt"), str):
            body |= {"n": 1, "size": "64x64"}
        status, said = ask(address, body=json.dumps(body).encode("utf-8", "surrogatepass"))
        statuses[status] += 1
        assert status in (200, 400) and ("error" in said) == (status == 400), (status, said)

    check()
    print(dict(statuses))
    assert statuses[400] > 100 and statuses[200] > 0 and alive(address)


def red(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, kind)
    return file.getvalue()


def test_any_bytes_in_place_of_images_are_answered_or_refused(serve):
    """Files of each kind with bytes changed, cut off or put in, and files of nothing but noise."""
    whole = [png(), png(hole=(0, 0, 9, 9)), *map(red, ("JPEG", "WEBP"))]
    address, statuses = serve(), collections.Counter()

    @st.composite
    def broken(draw) -> bytes:
        data = bytearray(draw(st.sampled_from(whole)))
        for _ in range(draw(st.integers(0, 4))):
            place = draw(st.integers(0, len(data)))
            data[place : place + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
        return bytes(data)

    @often
    @given(st.sampled_from(["variations", "edits"]), broken() | st.binary(max_size=200), broken() | st.none())
    def check(endpoint, image, mask) -> None:
        fields = {"image": ("x.png", image), "size": b"64x64", "n": b"1"}
        if endpoint == "edits":
            fields |= {"prompt": b"a ring"} | ({"mask": ("m.png", mask)} if mask is not None else {})
        status, said = ask(address, "POST", f"/v1/images/{endpoint}", *form(fields))
        statuses[status] += 1
        assert status in (200, 400) and ("error" in said) == (status == 400), (status, said)

    check()
    print(dict(statuses))
    assert statuses[400] > 100 and statuses[200] > 0 and alive(address)


def test_any_multipart_is_answered_or_refused(serve):
    """Forms with anything for their fields, cut anywhere, under any boundary."""
    address, statuses = serve(), collections.Counter()
    file = red("PNG")

    @often
    @given(st.dictionaries(NAMES, st.binary(max_size=20), max_size=4), st.integers(0, 400), st.sampled_from(["b", "c", ""]))
    def check(fields, end, boundary) -> None:
        body, _ = form({"image": ("x.png", file)} | fields | {"size": b"64x64", "n": b"1"})
        kind = f"multipart/form-data; boundary={boundary}"
        status, said = ask(address, "POST", "/v1/images/variations", body[: len(body) - end], {"content-type": kind})
        statuses[status] += 1
        assert status in (200, 400) and ("error" in said) == (status == 400), (status, said)

    check()
    print(dict(statuses))
    assert statuses[400] > 100 and alive(address)
