"""`app.py` in a Space: it listens where the environment says, under any name."""

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import yaml
from conftest import ROOT

HEADER = (ROOT / "spaces/README.md").read_text(encoding="utf-8").split("---\n")[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def status(port: int, host: str) -> int:
    """What the page answers a request under this name."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/config", headers={"Host": host})
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(("name", "foreign"), [("0.0.0.0", 200), ("127.0.0.1", 403)])
def test_it_listens_where_the_environment_says(tiny_folder, tmp_path, name, foreign):
    port = free_port()
    environment = os.environ | {"GRADIO_SERVER_NAME": name, "PORT": str(port), "TMPDIR": str(tmp_path)}
    command = [sys.executable, yaml.safe_load(HEADER)["app_file"], "--model", str(tiny_folder), "--dtype", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        address = process.stdout.readline().strip()
        assert address.rstrip("/").endswith(f":{port}"), address or process.stderr.read()
        assert status(port, f"localhost:{port}") == 200
        assert status(port, "someone-circles.hf.space") == foreign, "on loopback another name is DNS rebinding"
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_none_is_one_line(command, monkeypatch):
    monkeypatch.setenv("PORT", "a door")
    code, _, complaint = command("app")
    assert code == 2 and complaint.strip().splitlines()[-1] == "error: PORT must be a number, got 'a door'"


def test_the_header_is_one_that_the_hub_reads():
    header = yaml.safe_load(HEADER)
    assert header["sdk"] == "gradio" and (ROOT / header["app_file"]).is_file()
    assert f"gradio=={header['sdk_version']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len(header["short_description"]) <= 60 and header["colorFrom"] in ("red", "yellow", "green", "blue", "indigo")
