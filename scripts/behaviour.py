"""Write what the package in the current folder answers, for `compare_behaviour.py`: one process, public entry points only."""

import argparse
import base64
import contextlib
import hashlib
import inspect
import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

OWN = ("prior", "decoder", "upsamplers", "unclip")  # packages; other libraries add methods to classes while they run
PARTS = ("options", "training", "losses", "tools", "server")
STEPS = 2  # of a new run; a resumed one takes as many again
CURVE = 20  # steps of a loss curve
STAGES = (
    "clip",
    "prior",
    "prior_autoregressive",
    "text_proj",
    "decoder",
    "draft",
    "layout",
    "decoder_distill",
    "upsampler_256",
    "upsampler_1024",
    "judge",
)
DEFAULTS = {
    "prior_num_inference_steps": 2,
    "prior_guidance_scale": 2,
    "decoder_num_inference_steps": 2,
    "decoder_guidance_scale": 2,
    "super_res_num_inference_steps": 2,
    "upsampler_1024_num_inference_steps": 1,
}
TIMED = (
    "seconds",
    "images_per_s",
    "step_s",
    "data_wait_s",
    "tflops",
    "mfu",
    "peak_memory",
)  # columns of a log that no two runs share
STAR, RING = "a red star", "two rings"


class Runner:
    """Runs parts in this process, whose `unclip` is the tree's, and writes what they answer to `out`.

    `fixed` holds the checkpoints that BASE trained.
    """

    def __init__(self, out: Path, fixed: Path):
        self.out, self.fixed = out, fixed

    def command(self, *words: Any, script: str | None = None) -> dict[str, Any]:
        """What `python -m unclip WORDS` or `python SCRIPT WORDS` prints and its exit code."""
        sys.argv = [script or "unclip", *map(str, words)]
        said, told = io.StringIO(), io.StringIO()
        code: Any = 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            try:
                if script is None:
                    runpy.run_module("unclip", run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(script, run_name="__main__")
            except SystemExit as ended:
                code = ended.code or 0
        text = said.getvalue().replace(str(self.out), "OUT").replace(str(self.fixed), "FIXED")
        return {"command": [str(w) for w in words[:1]], "code": code, "stdout": text, "stderr": told.getvalue()}

    def must(self, *words: Any, script: str | None = None) -> None:
        """Run a command that has to succeed."""
        answer = self.command(*words, script=script)
        if answer["code"] != 0:
            raise SystemExit(f"{' '.join(map(str, words))} ended with {answer['code']}: {answer['stderr'][-2000:]}")

    def write(self, name: str, content: Any) -> None:
        path = self.out / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")

    # -- training

    def train_fixed(self) -> None:
        """Train BASE's tiny stages and export the models that are drawn with."""
        for stage in STAGES:
            if Path(f"configs/tiny/{stage}.yaml").is_file():  # a later stage is not in every BASE
                self._train(stage, self.fixed / stage, STEPS)
        images = self.fixed / "images"
        images.mkdir()
        _write_images(images)
        self._export(self.fixed)

    def _stages(self) -> list[str]:
        """The stages that BASE has trained."""
        return [stage for stage in STAGES if (self.fixed / stage).is_dir()]

    def losses(self) -> None:
        """The loss of every step of 20, of each stage."""
        for stage in self._stages():
            self._train(stage, self.out / stage, CURVE, save_every=CURVE, sample_every=0)
            rows = [json.loads(line) for line in (self.out / stage / "log.jsonl").read_text().splitlines()]
            shutil.rmtree(self.out / stage)
            self.write(f"{stage}.curve", [row["loss"] for row in rows if row["kind"] == "train"])

    def _train(self, stage: str, folder: Path, steps: int, save_every: int = STEPS, sample_every: int = STEPS) -> None:
        settings = [f"output_dir={folder}", f"max_steps={steps}", f"save_every={save_every}"]
        settings += [f"sample_every={sample_every}", "save_minutes=0", "log_every=1"]
        if stage not in ("clip", "judge", "upsampler_256", "upsampler_1024"):
            settings.append(f"objective.clip={self.fixed / 'clip'}")
        if stage == "decoder_distill":
            settings.append(f"init_from={self.fixed / 'decoder'}")
        self.must(f"configs/tiny/{stage}.yaml", *settings, script="train.py")

    def _export(self, folder: Path) -> None:
        defaults = [word for key, value in DEFAULTS.items() for word in ("--default", f"{key}={value}")]
        shared = ["clip", "decoder", "upsampler_256", "upsampler_1024"]
        models = {"model": [*shared, "prior", "decoder_distill"], "autoregressive": [*shared, "prior_autoregressive"]}
        for name, runs in models.items():
            self.must("export", *(self.fixed / run for run in runs), folder / name, *defaults)

    def training(self) -> None:
        for stage in self._stages():
            new, resumed = self.out / "new" / stage, self.out / "resumed" / stage
            self._train(stage, new, STEPS)
            resumed.mkdir(parents=True)
            checkpoint = f"checkpoint-{STEPS:08d}"
            shutil.copytree(self.fixed / stage / checkpoint, resumed / checkpoint)
            shutil.copy(self.fixed / stage / "log.jsonl", resumed)
            self._train(stage, resumed, 2 * STEPS)
            for folder in (new, resumed):
                rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                self.write(f"{folder.parent.name}/{stage}.log", [{k: v for k, v in r.items() if k not in TIMED} for r in rows])
                for path in (folder / "log.jsonl", *folder.glob("*/state.json"), *folder.glob("*/manifest.json")):
                    path.unlink(missing_ok=True)  # they hold seconds
        self._export(self.out / "exported")

    # -- tools

    def tools(self) -> None:
        images, out = self.fixed / "images", self.out
        cat, mask = images / "cat.png", images / "mask.png"
        (out / "prompts.txt").write_text(f"{STAR}\n{RING}\n")
        small = ["--size", 64, "--model", self.fixed / "model"]
        draw = ["generate", STAR, *small]
        commands = {
            "draw": [*draw, RING, "--num-images", 2],
            "draw_256": ["generate", STAR, "--size", 256, "--model", self.fixed / "model", "--seed", 3],
            "draw_fp32": [*draw, "--dtype", "fp32", "--guidance-interval", 0.1, 0.9, "--timestep-shift", 2, "--transparent"],
            "draw_low_memory": [*draw, "--low-memory", "--prior-guidance", 1, "--guidance", 1],
            "draw_guided": [*draw, "--clip-guidance", 0.1],
            "draw_without_prior": [*draw, "--prior", "none"],
            "draw_ddim": [*draw, "--sampler", "ddim", "--steps", 3],
            "draw_distilled": [*draw, "--sampler", "distilled"],
            "draw_file": ["generate", "--prompts", out / "prompts.txt", *small],
            "draw_autoregressive": ["generate", STAR, "--size", 64, "--model", self.fixed / "autoregressive"],
            "rerank": ["rerank", STAR, "--candidates", 4, "--keep", 2, *small],
            "variations": ["variations", cat, "-n", 2, *small],
            "variations_eta": ["variations", cat, "-n", 1, "--eta", 0.3, "--prompt", STAR, *small],
            "interpolate": ["interpolate", cat, RING, "--steps", 3, *small],
            "interpolate_noise": ["interpolate", cat, images / "ring.png", "--steps", 3, "--noise", "interpolated", *small],
            "pca": ["pca", cat, "--of", images, "--save-axes", out / "pca" / "axes.safetensors", *small],
            "embed": ["embed", images, out / "embed", "--model", self.fixed / "model", "--device", "cpu"],
        }
        for name, words in commands.items():
            answer = self.command(*words, *([] if name == "embed" else ["--out", out / name]))
            self.write(f"{name}.answer", answer)
        one_file = {
            "edit": ["edit", cat, "--from", "a cat", "--to", STAR],
            "inpaint": ["inpaint", cat, mask, STAR],
            "outpaint": ["outpaint", cat, STAR, "--left", 30],
        }
        for name, words in one_file.items():
            self.write(f"{name}.answer", self.command(*words, "--out", out / f"{name}.png", *small))
        model = ["--model", self.fixed / "model", "--json"]
        printing = {
            "classify": ["classify", cat, "cat", "star", *model],
            "search": ["search", STAR, images, *model],
            "plot": ["plot", self.fixed / "prior", "--out", out / "curves.png"],
            "no_prompt": ["generate", "", *small],
            "no_such_size": ["generate", STAR, "--size", 100],
            "no_such_option": ["generate", STAR, "--colour", "red"],
            "no_image": ["variations", "none.png", "--out", out / "none", *small],
            "no_config": ["train", "none.yaml"],
        }
        for name, words in printing.items():
            self.write(f"{name}.answer", self.command(*words))
        planned = self.command("plan", "tiny/decoder", f"objective.clip={self.fixed / 'clip'}", "--gpus", 1, "--json")
        # bytes of activations depend on when Python frees tensors
        plan = {k: v for k, v in json.loads(planned["stdout"]).items() if k != "strategies"}
        self.write("plan.answer", planned | {"stdout": plan})
        self._tensors(cat)

    def _tensors(self, image: Path) -> None:
        """Embeddings by the exported names."""
        import torch
        from PIL import Image
        from safetensors.torch import save_file

        import unclip

        model = str(self.fixed / "model")
        clip = unclip.CLIP.from_pretrained(model)
        prior = unclip.UnCLIPPriorPipeline.from_pretrained(model)
        prior.set_progress_bar_config(disable=True)
        answer = prior(STAR, generator=torch.Generator().manual_seed(0))
        tensors = {k: v for k, v in answer.items() if isinstance(v, torch.Tensor)}
        with Image.open(image) as opened:
            tensors |= {"text": clip.encode_text([STAR, RING]), "image": clip.encode_image(opened.convert("RGB"))}
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.out / "tensors.safetensors")

    # -- options

    def options(self) -> None:
        import typer

        import unclip
        from unclip.cli import app

        def parameters(command: Any) -> dict[str, Any]:
            if hasattr(command, "commands"):
                return {name: parameters(c) for name, c in command.commands.items()}
            facts = ("opts", "secondary_opts", "default", "required", "nargs", "multiple", "type")
            return {p.name: [f"{fact}={getattr(p, fact, None)}" for fact in facts] for p in command.params}

        self.write("commands", parameters(typer.main.get_command(app)))
        signatures = {}
        for name in unclip.__all__:
            public = getattr(unclip, name)
            classes = [c for c in getattr(public, "__mro__", ()) if c.__module__.split(".")[0] in OWN]
            members = {m for c in classes for m in vars(c) if not m.startswith("_") or m in ("__init__", "__call__")}
            signatures[name] = {member: _signature(getattr(public, member)) for member in members}
        self.write("names", signatures)

    # -- server

    def server(self) -> None:
        command = [sys.executable, "-m", "unclip", "serve", "--model", self.fixed / "model", "--port", "0", "--no-app"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                address = process.stdout.readline().strip()
                for name, (method, path, body, kind) in _requests(self.fixed / "images").items():
                    self.write(name, _ask(address + path, method, body, kind))
            finally:
                process.send_signal(signal.SIGTERM)


def _signature(function: Any) -> str:
    """Names, kinds and defaults of parameters; annotations may move with their classes."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return "none"
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return re.sub(r" at 0x\w+", "", str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty)))


def _write_images(folder: Path) -> None:
    from PIL import Image, ImageDraw

    for name, colour in (("cat", (200, 60, 40)), ("ring", (40, 90, 200)), ("moon", (230, 200, 40))):
        image = Image.new("RGB", (90, 70), "white")
        ImageDraw.Draw(image).ellipse((10, 10, 60, 50), fill=colour)
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}")
    mask = Image.new("L", (90, 70))
    mask.paste(255, (50, 0, 90, 70))
    mask.save(folder / "mask.png")
    (folder / "mask.txt").write_text("a mask")


def _requests(images: Path) -> dict[str, tuple[str, str, bytes, str]]:
    """Method, path, body and content type by the name of each request."""

    def form(fields: dict[str, bytes], files: dict[str, Path]) -> tuple[bytes, str]:
        parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n'.encode() + v + b"\r\n" for k, v in fields.items()]
        for key, path in files.items():
            head = f'--b\r\nContent-Disposition: form-data; name="{key}"; filename="{path.name}"\r\n\r\n'
            parts.append(head.encode() + path.read_bytes() + b"\r\n")
        return b"".join([*parts, b"--b--\r\n"]), "multipart/form-data; boundary=b"

    asked = {"prompt": STAR, "size": "64x64", "n": 2, "response_format": "b64_json", "seed": 5}
    plain = {"size": b"64x64", "response_format": b"b64_json", "seed": b"5"}
    mine = {"image": images / "cat.png"}
    path, kind = "/v1/images/generations", "application/json"
    return {
        "models": ("GET", "/v1/models", b"", kind),
        "health": ("GET", "/healthz", b"", kind),
        "generation": ("POST", path, json.dumps(asked).encode(), kind),
        "variation": ("POST", "/v1/images/variations", *form(plain, mine)),
        "edit": ("POST", "/v1/images/edits", *form(plain | {"prompt": b"a ring"}, mine | {"mask": images / "mask.png"})),
        "no_prompt": ("POST", path, b"{}", kind),
        "no_json": ("POST", path, b"{", kind),
        "unknown_key": ("POST", path, json.dumps(asked | {"colour": "red"}).encode(), kind),
        "unknown_size": ("POST", path, json.dumps(asked | {"size": "65x65"}).encode(), kind),
        "no_such_path": ("GET", "/v1/none", b"", kind),
    }


def _ask(address: str, method: str, body: bytes, kind: str) -> dict[str, Any]:
    """Status and body of an answer; of images their hash, of messages and times only that they are there."""
    request = urllib.request.Request(address, body or None, {"content-type": kind}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return {"status": answer.status, "body": _comparable(json.loads(answer.read()))}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": _comparable(json.loads(error.read()))}


def _comparable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _comparable(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_comparable(v) for v in value]
    if key == "b64_json":
        return hashlib.sha256(base64.b64decode(value)).hexdigest()
    return type(value).__name__ if key in ("created", "message") else value


def main() -> None:
    import unclip

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="Folder of the answers.")
    parser.add_argument("fixed", type=Path, help="Folder of the checkpoints; trained first if it is not there.")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    options = parser.parse_args()
    if Path(unclip.__file__).resolve().parents[1] != Path.cwd().resolve():
        raise SystemExit(f"unclip comes from {unclip.__file__}, not from {Path.cwd()}")
    if not options.fixed.is_dir() and set(options.parts) != {"options"}:  # at its final place, which the runs note down
        options.fixed.mkdir(parents=True)
        try:
            _timed("checkpoints", Runner(options.fixed, options.fixed).train_fixed)
        except BaseException:
            shutil.rmtree(options.fixed)
            raise
    for part in options.parts:
        out = options.out / part
        out.mkdir(parents=True)
        _timed(part, getattr(Runner(out, options.fixed), part))


def _timed(name: str, function: Callable[[], None]) -> None:
    start = time.monotonic()
    function()
    print(f"  {name}: {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
