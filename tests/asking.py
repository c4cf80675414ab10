"""Requests to a server as they go over the wire, well-formed or not."""

import http.client
import json
import socket
import urllib.request
from urllib.parse import urlsplit


def ask(address: str, method="POST", path="/v1/images/generations", body=b"", headers=None) -> tuple[int, dict]:
    """Status and parsed body of an answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    try:
        connection.request(method, path, body, headers or {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(text) if kind.startswith("application/json") else {"raw": text}
    finally:
        connection.close()


def raw(address: str, data: bytes, wait: float = 20) -> bytes:
    """What comes back for bytes as they are, until the server closes the connection."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=wait) as connection:
        connection.sendall(data)
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except ConnectionResetError:
            pass
        return got


def form(fields: dict[str, bytes | tuple[str, bytes]], boundary: str = "b") -> tuple[bytes, dict[str, str]]:
    parts = []
    for name, value in fields.items():
        file, value = value if isinstance(value, tuple) else (None, value)
        says = f'; filename="{file}"' if file is not None else ""
        parts += [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{says}\r\n\r\n'.encode() + value + b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), {"content-type": f"multipart/form-data; boundary={boundary}"}


def alive(address: str) -> bool:
    return urllib.request.urlopen(f"{address}/healthz", timeout=20).status == 200
