"""`unclip serve`, as a process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from asking import ask
from conftest import ROOT

pytest.importorskip("uvicorn")


@pytest.mark.slow
def test_sigterm_lets_what_was_asked_be_drawn(tiny_folder):
    """A request that is under way is answered; the process ends with code 0, its log a line of JSON each."""
    command = [sys.executable, "-m", "unclip", "serve", "--port", "0", "--model", tiny_folder, "--no-app", "--dtype", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ)
    try:
        address = process.stdout.readline().strip()
        body = json.dumps({"prompt": "a secret ring", "size": "1024x1024", "response_format": "b64_json"}).encode()
        request = urllib.request.Request(f"{address}/v1/images/generations", body, {"content-type": "application/json"})
        answers = []
        asking = threading.Thread(target=lambda: answers.append(json.load(urllib.request.urlopen(request, timeout=120))))
        asking.start()
        while "unclip_running_pictures 1.0" not in urllib.request.urlopen(f"{address}/metrics").read().decode():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        asking.join(120)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and len(answers[0]["data"][0]["b64_json"]) > 1000
    lines = [json.loads(line) for line in log.splitlines()]
    assert [x["status"] for x in lines if x.get("path") == "/v1/images/generations"] == [200]
    assert "secret" not in log


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_the_address_that_it_listens_on_is_a_name_it_goes_by(host, command, tiny_folder, monkeypatch):
    """Any of this machine's own, from the command line to the page; but no other machine's (DNS rebinding)."""
    from unclip.server.serving import server

    statuses = {}

    def run(app, listener, drain: float) -> None:
        running = server(app, drain)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://{host}:{listener.getsockname()[1]}"
        for path in ("/v1/models", "/app/"):
            statuses[path] = ask(address, "GET", path)[0]
        statuses["evil"] = ask(address, "GET", "/v1/models", headers={"host": "evil.example"})[0]
        running.handle_exit(signal.SIGTERM, None)
        thread.join(20)

    monkeypatch.setattr("unclip.server.run", run)
    code, out, err = command("serve", "--host", host, "--port", "0", "--model", tiny_folder, "--dtype", "fp32")
    assert code == 0 and out.startswith(f"http://{host}:"), err
    assert statuses == {"/v1/models": 200, "/app/": 200, "evil": 403}


BAD = [
    (["--host", "0.0.0.0"], "--api-key-file, or --insecure"),
    (["--api-key-file", "nowhere"], "there is no key file nowhere"),
    (["--rate", "0"], "at least 1 image a minute, got 0"),
    (["--queue", "19"], "queue must be at least 20, twice the images that one request may ask for, got 19"),
    (["--deadline", "0"], "deadline must be more than 0 seconds, got 0.0"),
    (["--public-url", "ftp://x"], "got 'ftp://x'"),
    (["--content-filter", "nowhere:check"], "--content-filter nowhere:check cannot be imported"),
    (["--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
    (["--search", "nowhere"], "nowhere is not a folder"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_mistakes_are_one_line_and_exit_code_2(words, message, command, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("serve", "--port", "0", "--model", tiny_folder, *words)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1
