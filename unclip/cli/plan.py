"""`unclip plan`: the memory, work and time of a training run."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def plan(  # noqa: PLR0913 - the parameters of a command are its options
    config: Annotated[Path, typer.Argument(help="A stage's configuration: a file, or a shipped one, as dalle2/decoder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many; 0 plans for this CPU.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, as 80GB.")] = "80GB",
    tflops: Annotated[
        float | None, typer.Option(help="Dense peak of one GPU; default: 312, an A100's in bf16 (a CPU: 0.7).")
    ] = None,
    utilisation: Annotated[float | None, typer.Option(help="The share of it that training keeps; default: 0.35.")] = None,
    as_json: Json = False,
) -> None:
    """Count a run's parameters, work, memory per GPU and time, without allocating a weight."""
    from ..training.planning import plan as planned

    if tflops is not None and tflops <= 0:
        raise ValueError(f"tflops must be above 0, got {tflops}")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {utilisation}")
    found = planned(config, overrides or [], gpus, parse_bytes(gpu_memory), tflops, utilisation)
    print(json.dumps(found.as_dict()) if as_json else describe(found))


def parse_bytes(text: str) -> int:
    """ "80GB" -> 80,000,000,000. Raises ValueError naming what cannot be read."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no amount of memory; write it as 80GB or 24GiB")
    unit = UNITS[found[2].upper()]
    return int(float(found[1]) * (1024 ** (len(str(unit)) // 3) if found[3] else unit))


def describe(plan: Any) -> str:
    """A plan as the lines that the command prints."""
    from ..training.planning import USABLE

    parts = ", ".join(f"{name} {_count(n)}" for name, n in plan.parameters.items())
    whole = sum(plan.parameters.values())
    where = f"{plan.gpus} GPU{'s' * (plan.gpus > 1)}" if plan.gpus else "this CPU"
    lines = [
        f"{plan.stage} on {where}, {plan.precision}",
        f"trained parameters   {_count(plan.trained)} ({parts}{'' if plan.trained == whole else ', the rest of them frozen'})",
    ]
    if plan.frozen_parameters:
        lines.append(f"frozen CLIP          {_count(plan.frozen_parameters)}")
    again = f"; {_flops(plan.checkpointed_flops)} with activation checkpointing" if plan.checkpointed_flops else ""
    lines += [
        f"work of a sample     {_flops(plan.forward_flops)} forward, {_flops(plan.training_flops)} in training{again}",
        f"samples              {plan.examples:,} = {plan.steps:,} steps x {plan.global_batch:,}",
        "",
        f"memory in GB, {plan.batch} samples at once:",
        f"{'':34}{'weights':>9}{'average':>9}{'Adam':>9}{'gradients':>11}{'activations':>13}{'CLIP':>7}{'total':>9}",
    ]
    for s in plan.strategies:
        terms = (s.weights, s.ema, s.optimiser, s.gradients, s.activations, s.frozen, s.total)
        figures = "".join(f"{n / 1e9:>{w}.{1 if n > 1e9 else 3}f}" for n, w in zip(terms, (9, 9, 9, 11, 13, 7, 9), strict=True))
        fits = "fits" if s.total <= USABLE * plan.memory else "does not fit"
        lines.append(f"{s.name:34}{figures}" + (f"  {fits}" if plan.gpus else ""))
    if plan.gpus:
        lines.append(f"(of {plan.memory / 1e9:.0f} GB, {USABLE:.0%} are reckoned with)")
    days, unit = plan.device_days(), "GPU-days" if plan.gpus else "days"
    spread = f", {days / plan.gpus:,.1f} days on {plan.gpus}" if plan.gpus > 1 else ""
    more = f"; {plan.device_days(True):,.1f} with activation checkpointing" if plan.checkpointed_flops else ""
    lines += [
        "",
        f"time                 {days:,.{1 if days > 1 else 3}f} {unit}{spread}{more}",
        f"                     at {plan.tflops * plan.utilisation:.3g} TFLOP/s "
        f"({plan.utilisation:.0%} of {plan.tflops:g}, assumed)",
        f"data read            {plan.read_bytes / 1e9:,.1f} GB ({plan.read_basis})",
    ]
    return "\n".join(lines + [f"note: {note}" for note in plan.notes])


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _flops(number: int) -> str:
    return f"{number / 1e12:,.2f} TFLOP" if number >= 1e12 else f"{number / 1e9:,.3g} GFLOP"
