"""`unclip generate` and `unclip rerank`: images of prompts."""

import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .batch import read_prompts, sample_all
from .images import load, output_files, save, slug
from .options import Device, Dtype, Force, LowMemory, Model, NoMetadata, Sampler, Seed, Size, Steps, Transparent

Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; several sentences give several images.")
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="A sentence a line, drawn into the folder --out; can be stopped and resumed."
    ),
]
Out = Annotated[Path | None, typer.Option(help="A .png file, or a folder; default: a file named after the prompt, here.")]
NumImages = Annotated[int, typer.Option(help="Images for each prompt.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of the decoder.")]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Guide the decoder at these shares of its noise levels only, as 0 0.8."),
]
TimestepShift = Annotated[
    float | None, typer.Option(help="Above 1: take more of the decoder's steps at high noise; 1: evenly.")
]
Prior = Annotated[
    str | None,
    typer.Option(
        help="diffusion or autoregressive: which the model must have; none: the decoder is conditioned on text alone."
    ),
]
PriorGuidance = Annotated[float | None, typer.Option(help="Guidance scale of the prior.")]
ClipGuidance = Annotated[float, typer.Option(help="Pull the image to where CLIP sees the prompt: 0.1 is a little.")]
Style = Annotated[
    str | None, typer.Option(help="Drawing style, where the model knows several (emoji: noto, flat, 3d or twemoji).")
]
PriorSteps = Annotated[int | None, typer.Option(help="Denoising steps of the prior.")]
ShowProfile = Annotated[
    bool, typer.Option("--profile", help="Say what each stage costs: the images are drawn twice, to count and to time.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the networks first: minutes, and then faster; for many images.")
]

Job = tuple[str, int]  # a prompt, and the seed of one image


def generate(  # noqa: PLR0913 - the parameters of a command are its options
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    size: Size = None,
    seed: Seed = 0,
    num_images: NumImages = 1,
    guidance: Guidance = None,
    guidance_interval: GuidanceInterval = None,
    steps: Steps = None,
    timestep_shift: TimestepShift = None,
    sampler: Sampler = None,
    prior: Prior = None,
    prior_guidance: PriorGuidance = None,
    clip_guidance: ClipGuidance = 0.0,
    style: Style = None,
    prior_steps: PriorSteps = None,
    transparent: Transparent = False,
    low_memory: LowMemory = False,
    profile: ShowProfile = False,
    compile_networks: Compile = False,
    device: Device = None,
    dtype: Dtype = "auto",
    model: Model = "emoji",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Draw images of sentences and print the files' names."""
    if (not prompts) == (prompts_file is None):
        raise ValueError("give one PROMPT or several, or --prompts FILE" + (", not both" if prompts else ""))
    if prompts_file is not None and profile:
        raise ValueError("--profile goes with PROMPT, not with --prompts FILE")
    if prompts_file is not None and no_metadata:
        raise ValueError("--no-metadata goes with PROMPT: --prompts FILE tells by the metadata what is drawn already")
    jobs = jobs_of(read_prompts(prompts_file) if prompts_file is not None else prompts or [], num_images, seed)
    settings = {
        "size": size,
        "decoder_guidance_scale": guidance,
        "decoder_guidance_interval": guidance_interval,
        "decoder_num_inference_steps": steps,
        "decoder_timestep_shift": timestep_shift,
        "sampler": sampler,
        "prior": prior,
        "prior_guidance_scale": prior_guidance,
        "prior_num_inference_steps": prior_steps,
        "clip_guidance": clip_guidance,
        "style": style,
    }
    request = Request(jobs, settings, model, device, dtype, transparent, low_memory, compile_networks, no_metadata)
    if prompts_file is not None:
        _generate_file(request, out, force)
    else:
        _generate_prompts(request, out, profile, force)


def jobs_of(prompts: list[str], num_images: int, seed: int) -> list[Job]:
    """`num_images` jobs of each prompt, whose seeds count up from `seed`. Raises ValueError for a value out of range."""
    from ..pipelines.settings import MAX_IMAGES

    if num_images < 1 or len(prompts) * num_images > MAX_IMAGES:
        raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {len(prompts)} x {num_images}")
    if not 0 <= seed <= 2**63 - 1 - num_images:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"prompt is empty: {prompt!r}")
    return [(prompt, seed + n) for prompt in prompts for n in range(num_images)]


@dataclass(frozen=True)
class Request:
    """The jobs of one call of `unclip generate`, and the options for sampling them; `settings` go to the pipeline."""

    jobs: list[Job]
    settings: dict[str, Any]
    model: str
    device: str | None
    dtype: str
    transparent: bool
    low_memory: bool
    compile_networks: bool
    no_metadata: bool = False

    def sample(self, jobs: list[Job], pipe: Any) -> list:
        """One image for each job."""
        import torch

        from ..io.images import cut_out

        generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
        images = pipe([prompt for prompt, _ in jobs], generator=generators, **self.settings).images
        return [cut_out(image) for image in images] if self.transparent else images

    def load(self, default_device: str | None = None) -> tuple[Any, int]:
        """The pipeline, compiled if requested, and its batch size."""
        from ..pipelines.settings import images_at_once

        pipe = load(self.model, self.device or default_device, self.dtype, self.low_memory)
        batch = images_at_once(self.settings["size"] or pipe.sizes[-1])
        if self.compile_networks:
            self._compile(pipe, min(batch, len(self.jobs)))
        return pipe, batch

    def _compile(self, pipe: Any, count: int) -> None:
        """Sample once with every network compiled, and say how long the compiler took."""
        from ..runtime.profiling import Profile

        pipe.compile()
        print("compiling, which takes minutes: a first image is drawn and discarded", file=sys.stderr)
        warmup = Profile(pipe.device)
        with warmup.watch(pipe):
            self.sample(self.jobs[:count], pipe)
        taken = ", ".join(f"{cost.stage} {cost.seconds:.0f} s" for cost in warmup.costs.values() if cost.seconds > 1)
        print(f"compiled: {taken or 'already'}", file=sys.stderr)


def _generate_file(request: Request, out: Path | None, force: bool) -> None:
    """Sample the jobs of a file of prompts whose images the folder lacks."""
    if out is None or (out.suffix and not out.is_dir()):
        raise ValueError(f"--prompts needs a folder to draw into: --out DIR, got {out}")

    def prepare(default_device: str | None) -> tuple[Any, int]:
        pipe, batch = request.load(default_device)
        pipe.set_progress_bar_config(disable=True)
        return pipe, batch

    settings = request.settings | {"transparent": request.transparent or None}
    chosen = {name: value for name, value in settings.items() if value is not None}
    facts = {"model": request.model, "settings": json.dumps(chosen, sort_keys=True)}
    sample_all(request.jobs, out, facts, request.sample, prepare, force)


def _generate_prompts(request: Request, out: Path | None, profile: bool, force: bool) -> None:
    """Sample the jobs batch by batch and print the files' names; with `profile`, the first batch's costs too."""
    from ..runtime.profiling import Profile

    jobs = request.jobs
    files = output_files(out, [f"{slug(prompt)}-{seed}" for prompt, seed in jobs], force)
    pipe, batch = request.load()
    timed, counted = Profile(pipe.device), Profile(pipe.device, count=True)
    if profile:
        with counted.watch(pipe):  # and warms up
            request.sample(jobs[:batch], pipe)
    for start in range(0, len(jobs), batch):
        if len(jobs) > batch:
            print(f"images {start + 1} to {min(start + batch, len(jobs))} of {len(jobs)}", file=sys.stderr)
        chunk = jobs[start : start + batch]
        with timed.watch(pipe) if profile and start == 0 else nullcontext():
            images = request.sample(chunk, pipe)
        for image, (prompt, seed), path in zip(images, chunk, files[start : start + batch], strict=True):
            facts = {"prompt": prompt, "seed": str(seed), "model": request.model}
            save(image, path, None if request.no_metadata else facts)
            print(path)
    if profile:
        _print_profile(pipe, timed, counted, min(batch, len(jobs)))


def _print_profile(pipe: Any, timed: Any, counted: Any, batch: int) -> None:
    """Print the cost of each stage beside the measured peak of the device."""
    from ..runtime.profiling import measured_peak, table

    peak = measured_peak(pipe.device, pipe.decoder.dtype)
    print(table(timed, counted, peak), file=sys.stderr)
    what = f"{peak / 1e9:.0f} GFLOP/s in {str(pipe.decoder.dtype).removeprefix('torch.')}"
    print(f"peak: {what}, measured; images at once: {batch}", file=sys.stderr)


def rerank(  # noqa: PLR0913 - the parameters of a command are its options
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder of the kept images, the best first.")],
    candidates: Annotated[int, typer.Option(help="Images to draw and rank.")] = 64,
    keep: Annotated[int, typer.Option(help="Images to keep.")] = 8,
    size: Size = None,
    seed: Seed = 0,
    steps: Steps = None,
    transparent: Transparent = False,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Draw many small images, keep those that CLIP finds nearest to the prompt, and draw these in full."""
    import torch
    from tqdm import tqdm

    from ..pipelines.rerank import rerank as ranked
    from ..pipelines.settings import MAX_IMAGES, images_at_once

    if not prompt.strip():
        raise ValueError(f"prompt is empty: {prompt!r}")
    if not 1 <= candidates <= MAX_IMAGES:
        raise ValueError(f"candidates must be from 1 to {MAX_IMAGES}, got {candidates}")
    if not 1 <= keep <= candidates:
        raise ValueError(f"keep must be from 1 to the number of candidates ({candidates}), got {keep}")
    files = output_files(out, [f"{place:03d}" for place in range(1, keep + 1)], force)
    pipe = load(model, device, dtype)
    settings = {"decoder_num_inference_steps": steps}
    pipe.set_progress_bar_config(disable=True)

    def bar(batches: Iterable) -> Iterable:
        return tqdm(batches, desc="candidates", file=sys.stderr)

    best = ranked(pipe, prompt, candidates, keep, seed, images_at_once(64), bar, **settings)
    for (score, number), path in zip(tqdm(best, desc="drawing the best", file=sys.stderr), files, strict=True):
        image = pipe(prompt, generator=[torch.Generator().manual_seed(number)], size=size, **settings).images[0]
        facts = {"prompt": prompt, "seed": str(number), "model": model, "score": f"{score:.4f}"}
        save(image, path, None if no_metadata else facts, transparent)
        print(path)
