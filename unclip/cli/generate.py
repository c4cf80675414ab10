"""`unclip generate`: pictures of sentences."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from .batch import draw_all, read_prompts
from .options import Device, Dtype, Force, LowMemory, Model, Sampler, Seed, Size, Steps, Transparent
from .pictures import load, output_files, save, slug


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; several sentences give several pictures.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="A sentence a line, drawn into the folder --out; can be stopped and resumed."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .png file, or a folder; default: a file named after the prompt, here.")
    ] = None,
    size: Size = None,
    seed: Seed = 0,
    num_images: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the decoder.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Guide the decoder at these shares of its noise levels only, as 0 0.8."),
    ] = None,
    steps: Steps = None,
    timestep_shift: Annotated[
        float | None, typer.Option(help="Above 1: take more of the decoder's steps at high noise; 1: evenly.")
    ] = None,
    sampler: Sampler = None,
    prior: Annotated[
        str | None,
        typer.Option(help="diffusion or autoregressive: which the model must have; none: the decoder hears text alone."),
    ] = None,
    prior_guidance: Annotated[float | None, typer.Option(help="Guidance scale of the prior.")] = None,
    clip_guidance: Annotated[
        float, typer.Option(help="Pull the picture to where CLIP sees the prompt: 0.1 is a little.")
    ] = 0.0,
    style: Annotated[
        str | None, typer.Option(help="Drawing style, where the model knows several (emoji: noto, flat, 3d or twemoji).")
    ] = None,
    prior_steps: Annotated[int | None, typer.Option(help="Denoising steps of the prior.")] = None,
    transparent: Transparent = False,
    low_memory: LowMemory = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say what each stage costs: the pictures are drawn twice, to count and to time.")
    ] = False,
    compile_networks: Annotated[
        bool, typer.Option("--compile", help="Compile the networks first: minutes, and then faster; for many pictures.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    model: Model = "emoji",
    force: Force = False,
) -> None:
    """Draw pictures of sentences and print the files' names."""
    import torch

    from ..io.images import cut_out
    from ..pipelines.base import MAX_IMAGES, pictures_at_once
    from ..runtime.profiling import Profile, measured_peak, table

    if (not prompts) == (prompts_file is None):
        raise ValueError("give one PROMPT or several, or --prompts FILE" + (", not both" if prompts else ""))
    if prompts_file is not None and profile:
        raise ValueError("--profile goes with PROMPT, not with --prompts FILE")
    if prompts_file is not None:
        prompts = read_prompts(prompts_file)
    if num_images < 1 or len(prompts) * num_images > MAX_IMAGES:
        raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {len(prompts)} x {num_images}")
    if not 0 <= seed <= 2**63 - 1 - num_images:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    jobs = [(prompt, seed + n) for prompt in prompts for n in range(num_images)]
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"prompt is empty: {prompt!r}")
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

    def draw(chunk: list[tuple[str, int]], pipe) -> list:
        generators = [torch.Generator().manual_seed(number) for _, number in chunk]
        images = pipe([prompt for prompt, _ in chunk], generator=generators, **settings).images
        return [cut_out(image) for image in images] if transparent else images

    def prepare(place: str | None = None) -> tuple:
        pipe = load(model, device or place, dtype, low_memory)
        batch = pictures_at_once(size or pipe.sizes[-1])
        if compile_networks:
            warm_up(pipe, min(batch, len(jobs)))
        return pipe, batch

    def warm_up(pipe, count: int) -> None:
        """Draw once with every network compiled, and say how long the compiler took."""
        pipe.compile()
        print("compiling, which takes minutes: a first picture is drawn and thrown away", file=sys.stderr)
        warming = Profile(pipe.device)
        with warming.watch(pipe):
            draw(jobs[:count], pipe)
        taken = ", ".join(f"{cost.stage} {cost.seconds:.0f} s" for cost in warming.costs.values() if cost.seconds > 1)
        print(f"compiled: {taken or 'already'}", file=sys.stderr)

    if prompts_file is not None:
        if out is None or (out.suffix and not out.is_dir()):
            raise ValueError(f"--prompts needs a folder to draw into: --out DIR, got {out}")

        def quietly(place: str | None) -> tuple:
            pipe, batch = prepare(place)
            pipe.set_progress_bar_config(disable=True)
            return pipe, batch

        chosen = {k: v for k, v in (settings | {"transparent": transparent or None}).items() if v is not None}
        draw_all(jobs, out, {"model": model, "settings": json.dumps(chosen, sort_keys=True)}, draw, quietly, force)
        return
    files = output_files(out, [f"{slug(prompt)}-{number}" for prompt, number in jobs], force)
    pipe, batch = prepare()
    timed, counted = Profile(pipe.device), Profile(pipe.device, count=True)
    if profile:
        with counted.watch(pipe):  # and warms up
            draw(jobs[:batch], pipe)
    for start in range(0, len(jobs), batch):
        if len(jobs) > batch:
            print(f"pictures {start + 1} to {min(start + batch, len(jobs))} of {len(jobs)}", file=sys.stderr)
        chunk = jobs[start : start + batch]
        with timed.watch(pipe) if profile and start == 0 else nullcontext():
            images = draw(chunk, pipe)
        for image, (prompt, number), path in zip(images, chunk, files[start : start + batch], strict=True):
            save(image, path, {"prompt": prompt, "seed": str(number), "model": model})
            print(path)
    if profile:
        peak = measured_peak(pipe.device, pipe.decoder.dtype)
        print(table(timed, counted, peak), file=sys.stderr)
        what = f"{peak / 1e9:.0f} GFLOP/s in {str(pipe.decoder.dtype).removeprefix('torch.')}"
        print(f"peak: {what}, measured; pictures at once: {min(batch, len(jobs))}", file=sys.stderr)


def rerank(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder of the kept pictures, the best first.")],
    candidates: Annotated[int, typer.Option(help="Pictures to draw and rank.")] = 64,
    keep: Annotated[int, typer.Option(help="Pictures to keep.")] = 8,
    size: Size = None,
    seed: Seed = 0,
    steps: Steps = None,
    transparent: Transparent = False,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Draw many small pictures, keep those that CLIP finds nearest to the prompt, and draw these in full."""
    import torch
    from tqdm import tqdm

    from ..pipelines.base import MAX_IMAGES, pictures_at_once
    from ..pipelines.rerank import rerank as ranked

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

    def bar(batches):
        return tqdm(batches, desc="candidates", file=sys.stderr)

    best = ranked(pipe, prompt, candidates, keep, seed, pictures_at_once(64), bar, **settings)
    for (score, number), path in zip(tqdm(best, desc="drawing the best", file=sys.stderr), files, strict=True):
        image = pipe(prompt, generator=[torch.Generator().manual_seed(number)], size=size, **settings).images[0]
        save(image, path, {"prompt": prompt, "seed": str(number), "model": model, "score": f"{score:.4f}"}, transparent)
        print(path)
