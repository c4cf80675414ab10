"""The command `unclip`. Results go to stdout, everything else to stderr; a user's mistake is one line and exit code 2."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Build datasets.")
convert_app = typer.Typer(no_args_is_help=True, help="Bring other systems' checkpoints into this package's layout.")
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# The base of the parser's own complaints; typer carries a parser of its own or uses click's, depending on its version.
UsageMistake = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
# Pictures drawn at once: bounded by memory at 1024 px.
BATCH = {64: 16, 256: 8, 1024: 4}


def main() -> None:
    """Run the command line; never shows a traceback for a user's mistake."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        sys.exit(app(standalone_mode=False))
    except UsageMistake as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no arguments at all: the help, as it is
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(error.format_message() + _given(getattr(error, "param", None)))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        _fail(str(error))
    except FloatingPointError as error:  # not a mistake in the command: a run that diverged
        _fail(str(error), code=1)
    except RuntimeError as error:
        if type(error) is not RuntimeError or str(error).count("\n") > 2:
            raise
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _given(parameter) -> str:
    """The value that an option was given, for a complaint that does not say it."""
    words = sys.argv[1:]
    for name in getattr(parameter, "opts", ()):
        if name in words[:-1]:
            return f", got {words[words.index(name) + 1]!r}"
    return ""


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        from . import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text to image with unCLIP (DALL·E 2's design)."""


@app.command()
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several sentences give several pictures.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A .png file, or a folder; default: a file named after the prompt, here.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side in pixels: 64, 256 or 1024; default: the largest of the model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    num_images: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the decoder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the decoder.")] = None,
    prior_guidance: Annotated[float | None, typer.Option(help="Guidance scale of the prior.")] = None,
    prior_steps: Annotated[int | None, typer.Option(help="Denoising steps of the prior.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the first of cuda, mps, cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    model: Annotated[str, typer.Option(help='"emoji", a folder, or a Hub id.')] = "emoji",
    force: Annotated[bool, typer.Option(help="Overwrite existing files.")] = False,
) -> None:
    """Draw pictures of sentences and print the files' names."""
    from .pipelines.base import MAX_IMAGES

    if num_images < 1 or len(prompts) * num_images > MAX_IMAGES:
        raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {len(prompts)} x {num_images}")
    if not 0 <= seed <= 2**63 - 1 - num_images:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    jobs = [(prompt, seed + n) for prompt in prompts for n in range(num_images)]
    files = _output_files(out, jobs, force)
    pipe = _load(model, device, dtype)
    size = pipe.sizes[-1] if size is None else size
    batch = BATCH.get(size, 4)
    for start in range(0, len(jobs), batch):
        if len(jobs) > batch:
            print(f"pictures {start + 1} to {min(start + batch, len(jobs))} of {len(jobs)}", file=sys.stderr)
        chunk = jobs[start : start + batch]
        images = _draw(
            pipe,
            chunk,
            size=size,
            decoder_guidance_scale=guidance,
            decoder_num_inference_steps=steps,
            prior_guidance_scale=prior_guidance,
            prior_num_inference_steps=prior_steps,
        )
        for image, (prompt, number), path in zip(images, chunk, files[start : start + batch], strict=True):
            _save(image, path, {"prompt": prompt, "seed": str(number), "model": model})
            print(path)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A stage's configuration, for example configs/emoji/decoder.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
) -> None:
    """Train a stage, or go on where its output folder left off."""
    from .training import train as run

    run(config, overrides or [])


@app.command()
def export(
    parts: Annotated[
        list[Path], typer.Argument(metavar="RUN... OUT", help="Training runs (or folders of components), then the new folder.")
    ],
    default: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A sampling default, as decoder_guidance_scale=2.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Assemble a pipeline folder (fp16 safetensors) from the stages' averaged weights."""
    from .config import apply_overrides
    from .export import export_pipeline

    if len(parts) < 2:
        raise ValueError("give at least one run and the folder to write")
    print(export_pipeline(parts[:-1], parts[-1], force, apply_overrides({}, default or [])))


@convert_app.command()
def karlo(
    prior: Annotated[Path, typer.Option(help="The prior's .ckpt.")],
    decoder: Annotated[Path, typer.Option(help="The decoder's .ckpt.")],
    sr: Annotated[Path, typer.Option(help="The super-resolution's .ckpt.")],
    clip_stats: Annotated[Path, typer.Option(help="ViT-L-14_stats.th.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new pipeline.")],
    clip: Annotated[str, typer.Option(help="A transformers CLIP: a folder or a Hub id.")] = "openai/clip-vit-large-patch14",
    force: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Karlo's original files as a pipeline folder of safetensors."""
    from .convert import convert_karlo

    print(convert_karlo(prior, decoder, sr, clip_stats, out, clip, force))


@convert_app.command("kandinsky-prior")
def kandinsky_prior(
    prior: Annotated[Path, typer.Option(help="The prior's .ckpt.")],
    clip_stats: Annotated[Path, typer.Option(help="ViT-L-14_stats.th.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new pipeline.")],
    clip: Annotated[str, typer.Option(help="A transformers CLIP: a folder or a Hub id.")] = "openai/clip-vit-large-patch14",
    force: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """A Kandinsky 2 prior as a folder that predicts image embeddings (UnCLIPPriorPipeline)."""
    from .convert import convert_kandinsky_prior

    print(convert_kandinsky_prior(prior, clip_stats, out, clip, force))


@data_app.command()
def emoji(
    out: Annotated[Path, typer.Option(help="Folder of the dataset.")] = Path("data/emoji"),
    force: Annotated[bool, typer.Option(help="Build it again where one stands already.")] = False,
) -> None:
    """Build the captioned emoji dataset from npm packages (fetched with npm)."""
    from tqdm import tqdm

    from .data.emoji import build

    def progress(items, total):
        return tqdm(items, total=total, desc="sprites", file=sys.stderr)

    counts = build(out, log=lambda text: print(text, file=sys.stderr), progress=progress, force=force)
    for split, kinds in counts.items():
        print(f"{split}: {sum(kinds.values())} pictures")


# ---------------------------------------------------------------------------------------------- parts of `generate`


def _load(model: str, device: str | None, dtype: str):
    import diffusers
    import torch

    from .pipelines import UnCLIPPipeline
    from .precision import best_device

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    try:
        where = torch.device(device) if device else best_device()
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    diffusers.utils.logging.disable_progress_bar()
    kwargs = {} if dtype == "auto" else {"dtype": getattr(torch, DTYPES[dtype])}
    return UnCLIPPipeline.from_pretrained(model, **kwargs).to(where)


def _draw(pipe, jobs: list[tuple[str, int]], **settings) -> list:
    import torch

    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    return pipe([prompt for prompt, _ in jobs], generator=generators, **settings).images


def _output_files(out: Path | None, jobs: list[tuple[str, int]], force: bool) -> list[Path]:
    """Where each picture goes, checked before anything is drawn: writable, and not there already."""
    for prompt, _ in jobs:
        if not prompt.strip():
            raise ValueError(f"prompt is empty: {prompt!r}")
    if out is not None and out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out} must end in .png or be a folder")
        if len(jobs) > 1:
            raise ValueError(f"--out {out} is one file, but {len(jobs)} images were asked for; give a folder")
        files = [out]
    else:
        files = _unique([(out or Path(".")) / f"{_slug(prompt)}-{seed}.png" for prompt, seed in jobs])
    for path in files:
        if path.exists() and not force:
            raise ValueError(f"{path} exists; pass --force to overwrite it")
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    if not writable:
        raise ValueError(f"cannot write to {folder}: permission denied")
    return files


def _unique(files: list[Path]) -> list[Path]:
    """The same prompt given twice makes two files."""
    seen: dict[Path, int] = {}
    result = []
    for path in files:
        seen[path] = seen.get(path, 0) + 1
        result.append(path if seen[path] == 1 else path.with_stem(f"{path.stem}-{seen[path]}"))
    return result


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def _save(image, path: Path, facts: dict[str, str]) -> None:
    """Write a PNG with its facts in text chunks, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    from . import __version__

    info = PngInfo()
    for key, value in (facts | {"version": __version__}).items():
        info.add_itxt(key, value)
    partial = path.with_name(path.name + ".partial")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
