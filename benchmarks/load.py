"""How the server bears clients, the table of docs/server.md: latency, pictures a second, memory. On loopback only.

`python benchmarks/load.py [--model emoji] [--size 64] [--clients 1,4,16,64] [--requests 200] [--seconds 120]`

Starts `unclip serve` on a free port of 127.0.0.1 with a key for every client. For each number of clients, that many
ask for one picture after another, without pause, until `--requests` are answered or `--seconds` have passed. One client
is the one-at-a-time line that batches are compared with.
"""

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    counts = [int(n) for n in options.clients.split(",")]
    if not all(1 <= n <= 64 for n in counts) or not 1 <= options.requests <= 2000 or not 0 < options.seconds <= 600:
        parser.error("at most 64 clients, 2000 requests and 600 seconds")
    keys = [f"sk-{secrets.token_hex(16)}" for _ in range(max(counts))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.touch(0o600)
        file.write_text("\n".join(keys))
        command = [sys.executable, "-m", "unclip", "serve", "--port", "0", "--no-app", "--model", options.model]
        command += ["--api-key-file", file, "--queue", "256", "--deadline", "300"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                address = server.stdout.readline().strip()
                if not address.startswith("http://127.0.0.1:"):
                    sys.exit("error: the server did not start")
                ask(address, keys[0], options.size)  # the first one chooses dtypes and layouts
                print("clients  pictures/s  p50 s   p95 s   refused  failed  memory MiB")
                for count in counts:
                    print(measure(address, keys[:count], options, server.pid), flush=True)
            finally:
                server.terminate()


def ask(address: str, key: str, size: int) -> int:
    """The status of one request for a picture."""
    body = json.dumps({"prompt": "a red apple", "size": f"{size}x{size}", "response_format": "b64_json"}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{address}/v1/images/generations", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=330) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def measure(address: str, keys: list[str], options: argparse.Namespace, pid: int) -> str:
    """One line of the table."""
    left, lock, seconds, statuses = [options.requests], threading.Lock(), [], []
    before, began = memory(pid), time.monotonic()

    def client(key: str) -> None:
        while time.monotonic() - began < options.seconds:
            with lock:
                if not left[0]:
                    return
                left[0] -= 1
            started = time.monotonic()
            status = ask(address, key, options.size)
            with lock:
                seconds.append(time.monotonic() - started)
                statuses.append(status)

    threads = [threading.Thread(target=client, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    drawn, refused = statuses.count(200), statuses.count(429)
    cuts = statistics.quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else seconds * 19
    failed = len(statuses) - drawn - refused
    line = f"{len(keys):7}  {drawn / took:10.2f}  {cuts[9]:6.2f}  {cuts[18]:6.2f}  {refused:7}  {failed:6}"
    return f"{line}  {before:.0f} -> {memory(pid):.0f}"


def memory(pid: int) -> float:
    """Resident memory of a process in MiB; 0 where /proc does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
