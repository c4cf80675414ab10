"""Load test of the server, the tables of docs/server.md: latency, images a second, memory. On loopback only.

`python benchmarks/load.py [--model emoji] [--size 64] [--clients 1,4,16,64] [--requests 200] [--seconds 120]`
`python benchmarks/load.py --memory [--steps 2] [--size 64] [--clients 16] [--requests 1000] [--seconds 600]`

Starts `unclip serve` on a free port of 127.0.0.1 with a key for every client. For each number of clients, that many
ask for one image after another, without pause, until `--requests` are answered or `--seconds` have passed. One client
is the one-at-a-time line that batches are compared with. With `--memory`, of ten requests one is an edit, two are
variations and seven generations, half of them by URL, and a line tells the memory each time a tenth of them is answered.
`--steps` replaces the checkpoint's own numbers of steps, of prior and decoder.
"""

import argparse
import io
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

from PIL import Image

from unclip.io.checkpoints import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    counts = [int(n) for n in options.clients.split(",")]
    if not all(1 <= n <= 64 for n in counts) or not 1 <= options.requests <= 2000 or not 0 < options.seconds <= 600:
        parser.error("at most 64 clients, 2000 requests and 600 seconds")
    keys = [f"sk-{secrets.token_hex(16)}" for _ in range(max(counts))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.touch(0o600)
        file.write_text("\n".join(keys))
        model = options.model if options.steps is None else with_steps(options.model, Path(folder), options.steps)
        command = [sys.executable, "-m", "unclip", "serve", "--port", "0", "--no-app", "--model", model]
        command += ["--api-key-file", file, "--queue", "256", "--deadline", "300"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                address = server.stdout.readline().strip()
                if not address.startswith("http://127.0.0.1:"):
                    sys.exit("error: the server did not start")
                asking = Asking(address, options.size)
                for kind in range(KINDS if options.memory else 1):
                    asking.ask(keys[0], kind)  # the first ones choose dtypes and layouts
                print("clients  pictures/s  p50 s   p95 s   refused  failed  memory MiB")
                for count in counts:
                    print(measure(asking, keys[:count], options, server.pid), flush=True)
            finally:
                server.terminate()


def with_steps(model: str, folder: Path, steps: int) -> Path:
    """The model, through links, but for how many steps its prior and decoder take."""
    source, copy = resolve(model), folder / "model"
    copy.mkdir()
    for file in source.iterdir():
        if file.name != "model_index.json":
            (copy / file.name).symlink_to(file.resolve())
    index = json.loads((source / "model_index.json").read_text())
    for name in ("prior_num_inference_steps", "decoder_num_inference_steps"):
        index["defaults"][name] = steps
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


KINDS = 10


class Asking:
    """Requests for one image of `size` each."""

    def __init__(self, address: str, size: int):
        self.address, self.size = address, f"{size}x{size}"
        image, file = Image.new("RGBA", (256, 256), "red"), io.BytesIO()
        image.paste((0, 0, 0, 0), (0, 0, 128, 128))  # the hole of an edit
        image.save(file, "PNG")
        self.image = file.getvalue()

    def ask(self, key: str, kind: int = 0) -> int:
        """-> the answer's status; of `KINDS` kinds the last is an edit, the two before it are variations."""
        fields = {"size": self.size, "response_format": "url" if kind % 2 else "b64_json"}
        fields |= {} if KINDS - 3 <= kind < KINDS - 1 else {"prompt": "a red apple"}
        if kind < KINDS - 3:
            path, body, content = "generations", json.dumps(fields).encode(), "application/json"
        else:
            path, (body, content) = "edits" if kind == KINDS - 1 else "variations", self._form(fields)
        headers = {"content-type": content, "authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{self.address}/v1/images/{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=330) as answer:
                answer.read()
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def _form(self, fields: dict[str, str]) -> tuple[bytes, str]:
        start = '--limit\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
        parts = [(start.format(name, "") + value + "\r\n").encode() for name, value in fields.items()]
        parts += [start.format("image", '; filename="x.png"').encode(), self.image, b"\r\n--limit--\r\n"]
        return b"".join(parts), "multipart/form-data; boundary=limit"


def measure(asking: Asking, keys: list[str], options: argparse.Namespace, pid: int) -> str:
    """One line of the table."""
    left, lock, seconds, statuses = [options.requests], threading.Lock(), [], []
    tenth = max(options.requests // 10, 1)
    before, began = memory(pid), time.monotonic()

    def client(key: str) -> None:
        while time.monotonic() - began < options.seconds:
            with lock:
                if not left[0]:
                    return
                left[0] -= 1
                number = left[0]
            started = time.monotonic()
            status = asking.ask(key, number % KINDS if options.memory else 0)
            with lock:
                seconds.append(time.monotonic() - started)
                statuses.append(status)
                if options.memory and len(statuses) % tenth == 0:
                    print(f"  {len(statuses):5} answered, {memory(pid):.0f} MiB", flush=True)

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
