"""`unclip evaluate`: measures a model by its samples."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .images import load, need
from .options import Device, Dtype, Sampler, Steps


def evaluate(  # noqa: PLR0913 - the parameters of a command are its options
    model: Annotated[str, typer.Argument(metavar="MODEL", help='"emoji", a folder, or a Hub id.')],
    out: Annotated[Path, typer.Option(help="Folder of the report; the same evaluation goes on in it.")] = Path("report"),
    split: Annotated[str, typer.Option(help="dev (to compare runs by) or test (to report).")] = "dev",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Parts, repeatable: judge, recognition, everyday, composition, rectangle, fidelity, prior, sweeps, "
            "upsamplers, likeness, loss, flatness, style, parts, copies, pairs, attachments."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images of each kind, for a quick look.")] = None,
    scenes: Annotated[int, typer.Option(help="Scenes by which the part prior compares ways of drawing.")] = 2000,
    data: Annotated[str, typer.Option(help="The dataset that `unclip data emoji` built, or shapes.")] = "data/emoji",
    judge: Annotated[str | None, typer.Option(help="A judge's training run or folder; default: the split's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image of each kind; the next ones count up.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the decoder.")] = None,
    steps: Steps = None,
    sampler: Sampler = None,
    prior_guidance: Annotated[float | None, typer.Option(help="Guidance scale of the prior.")] = None,
    prior_steps: Annotated[int | None, typer.Option(help="Denoising steps of the prior.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option(help="Sample again what the report's folder holds.")] = False,
) -> None:
    """Measure a model by what it draws: a JSON and a one-page HTML report with images, protocol and intervals.

    Under `accelerate launch -m unclip evaluate ...` several processes share the drawing.
    """
    need("inflect", "resvg_py")
    from ..evaluation import Settings
    from ..evaluation import evaluate as run
    from ..runtime.processes import leave, own_device, together

    sampling = {
        "decoder_guidance_scale": guidance,
        "decoder_num_inference_steps": steps,
        "sampler": sampler,
        "prior_guidance_scale": prior_guidance,
        "prior_num_inference_steps": prior_steps,
    }
    settings = Settings(model, split, out, only or [], limit, data, judge, seed, sampling, force, scenes)
    command = shlex.join(["unclip", *sys.argv[1:]])
    state = together()
    for path in run(settings, lambda name: load(name, device or own_device(state), dtype), command):
        print(path)
    leave(state)
