"""The transcript of docs/server.md: the `openai` client and `unclip serve`, on loopback.

`python benchmarks/openai_client.py [--model emoji]` starts a server and prints what a Python prompt would show.
"""

import argparse
import code
import io
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

LINES = """
from openai import OpenAI
ai = OpenAI(base_url="{address}/v1", api_key="{key}")
[model.id for model in ai.models.list()]
drawn = ai.images.generate(prompt="a red heart", n=2, size="256x256")
[image.url[:51] + "…" for image in drawn.data]
import base64, io, urllib.request; from PIL import Image
heart = urllib.request.urlopen(drawn.data[0].url).read()
Image.open(io.BytesIO(heart)).text["prompt"]
varied = ai.images.create_variation(image=heart, n=3, size="256x256", response_format="b64_json")
[Image.open(io.BytesIO(base64.b64decode(image.b64_json))).size for image in varied.data]
image = Image.open(io.BytesIO(heart)).convert("RGBA")
image.paste((0, 0, 0, 0), (80, 80, 176, 176)); file = io.BytesIO(); image.save(file, "PNG")
edited = ai.images.edit(image=file.getvalue(), prompt="a red heart with a yellow star", size="256x256")
len(edited.data)
ai.images.generate(prompt="a red heart", size="300x300")
ai.images.generate(prompt="a red heart", n=11)
ai.images.create_variation(image=b"no image")
ai.images.edit(image=heart, prompt="a star")
ai.models.retrieve("dall-e-3")
OpenAI(base_url="{address}/v1", api_key="wrong").models.list()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    options = parser.parse_args()
    key = "sk-0123456789abcdef"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.touch(0o600)
        file.write_text(f"alice {key}\n")
        command = [sys.executable, "-m", "unclip", "serve", "--port", "0", "--no-app", "--model", options.model]
        command += ["--api-key-file", file]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                address = server.stdout.readline().strip()
                if not address:
                    sys.exit("error: the server did not start")
                console = code.InteractiveConsole()
                for line in LINES.strip().splitlines():
                    line = line.replace("{address}", address).replace("{key}", key)
                    said = io.StringIO()
                    with redirect_stdout(said), redirect_stderr(said):
                        console.push(line)
                    answer = said.getvalue().splitlines()
                    if answer and answer[0].startswith("Traceback"):
                        answer = answer[-1:]
                    print(">>> " + line, *answer, sep="\n", flush=True)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
