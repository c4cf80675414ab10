"""What hostile clients try, each with raw bytes on a real socket: none reaches a file, another host or another's time."""

import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib
from urllib.parse import urlsplit

import pytest
from asking import alive, ask, form, raw
from drawing import png
from PIL import Image
from pydantic import ValidationError

from unclip.server.wire import Generation

pytest.importorskip("uvicorn")


def test_no_path_leads_out_of_the_shelf(serve):
    address = serve()
    for path in (
        "/v1/images/files/../../../../etc/passwd",
        "/v1/images/files/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/images/files/%2e%2e/%2e%2e/etc/passwd",
        "/v1/images/files//etc/passwd",
        "/v1/images/files/%00.png",
        "/v1/images/files/" + "a" * 5000,
        "//etc/passwd",
    ):
        status, said = ask(address, "GET", path)
        assert status in (400, 404) and "root:" not in str(said), path
    body, headers = form({"image": ("../../../../tmp/unclip-was-here.png", png()), "size": b"64x64"})
    assert ask(address, "POST", "/v1/images/variations", body, headers)[0] == 200, "a file's name means nothing"


def test_nothing_is_fetched_by_url(serve):
    reached = []
    bait = socket.create_server(("127.0.0.1", 0))
    bait.settimeout(1)

    def listen() -> None:
        with contextlib.suppress(TimeoutError):
            reached.append(bait.accept())

    thread = threading.Thread(target=listen)
    thread.start()
    url = f"http://127.0.0.1:{bait.getsockname()[1]}/secret.png".encode()
    address = serve()
    for value in (url, b"file:///etc/passwd", (url.decode(), url), ("x.png", b"file:///etc/passwd")):
        body, headers = form({"image": value})
        status, said = ask(address, "POST", "/v1/images/variations", body, headers)
        assert status == 400 and said["error"]["param"] == "image"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url.decode()}"/></svg>'.encode()
    body, headers = form({"image": ("x.svg", svg)})
    assert ask(address, "POST", "/v1/images/variations", body, headers)[0] == 400
    thread.join()
    bait.close()
    assert not reached


def bomb(width: int, height: int) -> bytes:
    """A small PNG file of many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 4096)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A JPEG file that has its decoder go over all pixels `count` times."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    start = whole.rindex(b"\xff\xda")
    return whole[:start] + whole[start:-2] * count + b"\xff\xd9"


def test_bombs_are_refused_before_they_are_decoded(serve):
    address = serve()
    for name, data, word in (
        ("pixels", bomb(100_000, 100_000), "16 megapixels"),
        ("more pixels than 4096x4096", bomb(4104, 4096), "16 megapixels"),
        ("scans", scans(500), "scans"),
        ("text chunk", png()[:33] + _compressed_text(8 * 2**20) + png()[33:], "damaged"),
    ):
        body, headers = form({"image": ("x.png", data)})
        started = time.monotonic()
        status, said = ask(address, "POST", "/v1/images/variations", body, headers)
        assert status == 400 and word in said["error"]["message"], (name, said)
        assert time.monotonic() - started < 10, name


def _compressed_text(size: int) -> bytes:
    data = b"Comment\0\0" + zlib.compress(bytes(size), 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


def test_oversize_bodies_are_413_said_or_unsaid(serve):
    address = serve()
    assert ask(address, headers={"content-length": str(2**40)})[0] == 413
    body, headers = form({"image": ("x.png", png() + bytes(11 * 2**20)), "size": b"64x64"})
    status, said = ask(address, "POST", "/v1/images/variations", body, headers)
    assert status == 400 and "10 MiB" in said["error"]["message"]
    chunk = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    got = raw(address, head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 26)
    assert got == b"" or got.startswith(b"HTTP/1.1 413")
    assert alive(address)


def test_malformed_requests_are_400_and_harm_nothing(serve):
    address = serve()
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"prompt": ' + b"[" * 5000,
        b'{"prompt": 1}',
        b'{"prompt": "\\ud800"}',
    ):
        status, said = ask(address, body=body)
        assert status == 400 and said["error"]["type"] == "invalid_request_error", body[:20]
    good, headers = form({"image": ("x.png", png())})
    for body, kind in (
        (good, "multipart/form-data"),
        (good, "multipart/form-data; boundary="),
        (good, "multipart/form-data; boundary=other"),
        (good[:-9], headers["content-type"]),
        (good[:50], headers["content-type"]),
        (b"--b\r\n\r\n\r\n--b--", headers["content-type"]),
        (b"\r\n" * 5000, headers["content-type"]),
        (form({f"f{n}": b"x" for n in range(1100)})[0], headers["content-type"]),
        (good, "application/json"),
        (b"image=abc", "application/x-www-form-urlencoded"),
    ):
        status, said = ask(address, "POST", "/v1/images/variations", body, {"content-type": kind})
        assert status == 400 and "message" in said["error"], (kind, body[:40])
    for line in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"POST /v1/models HTTP/1.1\r\ncontent-length: -1\r\n\r\n"):
        assert raw(address, line).startswith(b"HTTP/1.1 400")
    smuggled = (
        b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET"
    )
    assert raw(address, smuggled).count(b"HTTP/1.1") == 1
    assert alive(address)


def test_oversized_headers_are_refused(serve):
    address = serve()
    for head in (b"GET /" + b"a" * 10**6, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 10**6):
        got = raw(address, head)
        assert (got == b"" or got.startswith(b"HTTP/1.1 400")) and alive(address)


def test_slow_clients_are_let_go(serve, monkeypatch):
    from unclip.server import serving

    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.3)
    address = serve(body_seconds=0.3)
    assert raw(address, b"GET /healthz HT", wait=10) == b"", "a request that is never finished"
    assert raw(address, b"", wait=10) == b"", "a connection that never asks"
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    assert raw(address, head + b"content-length: 99\r\n\r\n{", wait=10).startswith(b"HTTP/1.1 408"), "a body that never ends"
    second = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nGET /heal"
    assert raw(address, second, wait=10).startswith(b"HTTP/1.1 200"), "a second request that is never finished"
    assert alive(address)


def test_an_answer_that_is_not_taken_is_not_kept_for_ever(serve, monkeypatch):
    """One who asks, and again, and never reads."""
    from unclip.server import serving

    monkeypatch.setattr(serving, "WRITE_SECONDS", 0.3)
    address = serve()
    parts = urlsplit(address)
    request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    whole = len(raw(address, request + b"GET / HTTP/x\r\n\r\n"))
    count = 16 * 2**20 // whole  # more than the two sockets' buffers hold
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((parts.hostname, parts.port))
        asking = threading.Thread(target=_send, args=(connection, request * count))
        asking.start()
        time.sleep(1.5)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                got += len(part)
        asking.join(20)
    assert got < whole * count / 2, "the rest was let go"
    assert alive(address)


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)


def test_other_sites_pages_and_other_names_are_refused(serve):
    address = serve()
    own = urlsplit(address).netloc
    json_type = {"content-type": "text/plain"}
    assert ask(address, headers=json_type | {"origin": "http://evil.example"})[0] == 403
    assert ask(address, headers=json_type | {"origin": "null"})[0] == 403
    assert ask(address, headers=json_type | {"host": "evil.example"})[0] == 403, "DNS rebinding"
    assert ask(address, headers=json_type | {"host": "[::1"})[0] == 403
    assert ask(address, "GET", "/v1/models", headers={"origin": f"http://{own}"})[0] == 200
    port = own.partition(":")[2]
    assert ask(address, "GET", "/v1/models", headers={"host": f"localhost:{port}"})[0] == 200


def test_a_proxys_name_and_its_pages_are_this_servers(serve):
    """Whether the proxy passes the name on that it was asked by, or asks by the server's own."""
    address = serve(public_url="https://Pics.example.com/draw")
    for sent, status in (
        ({"host": "pics.example.com"}, 200),
        ({"host": "pics.example.com", "origin": "https://pics.example.com"}, 200),
        ({"origin": "https://pics.example.com"}, 200),
        ({"origin": "http://pics.example.com"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"host": "pics.example.com", "origin": "https://evil.example"}, 403),
        ({"host": "evil.example"}, 403),
    ):
        assert ask(address, "GET", "/v1/models", headers=sent)[0] == status, sent


def test_one_client_cannot_take_all_places(serve, slow_model):
    address = serve(queue=20)
    body = json.dumps({"prompt": "a ring", "n": 10, "size": "64x64"}).encode()
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(ask(address, body=body)[0])) for _ in range(3)]
    threads[0].start()
    assert slow_model.begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    while not statuses:  # of the two that wait, half the queue holds one
        time.sleep(0.005)
    assert statuses == [429] and serve.app.state.worker.waiting == 10
    slow_model.set()
    for thread in threads:
        thread.join(60)
    assert sorted(statuses) == [200, 200, 429]


@pytest.mark.parametrize(
    ("host", "keys", "insecure", "refused"),
    [
        ("127.0.0.1", False, False, False),
        ("127.8.8.8", False, False, False),
        ("::1", False, False, False),
        ("localhost", False, False, False),
        ("0.0.0.0", False, False, True),
        ("::", False, False, True),
        ("192.168.0.7", False, False, True),
        ("example.org", False, False, True),
        ("0.0.0.0", True, False, False),
        ("0.0.0.0", False, True, False),
    ],
)
def test_others_are_let_in_with_keys_or_explicitly(host, keys, insecure, refused):
    from unclip.server import check_binding

    if refused:
        with pytest.raises(ValueError, match="--api-key-file, or --insecure"):
            check_binding(host, keys, insecure)
    else:
        check_binding(host, keys, insecure)


def test_a_million_unknown_fields_are_one_error():
    """Each was an error of its own, made where every other client waits."""
    with pytest.raises(ValidationError) as caught:
        Generation.model_validate({str(n): 1 for n in range(1_000_000)} | {"prompt": "a star"})
    assert caught.value.error_count() == 1 and "at most 50 fields, got 1000001" in str(caught.value)
