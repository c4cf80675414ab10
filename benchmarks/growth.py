"""Sampling time by number of images, batch and size: a table, and a plot.

    python benchmarks/growth.py [--rounds 5] [--out growth.png]

The shipped model. Images: one after another at 64 px; batch: that many at once at 64 px; size: one image of 64, 256 and
1024 px. The dashed lines are linear in images and in pixels.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from turns import machine

from unclip import UnCLIPPipeline

CASES = {
    "images, one at a time": [(n, 1, 64) for n in (1, 2, 4)],
    "batch": [(n, n, 64) for n in (1, 2, 4, 8)],
    "size": [(1, 1, n) for n in (64, 256, 1024)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("growth.png"))
    options = parser.parse_args()
    pipe = UnCLIPPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)

    def taken(images: int, batch: int, size: int) -> float:
        start = time.perf_counter()
        for number in range(0, images, batch):
            seeds = [torch.Generator().manual_seed(number + n) for n in range(batch)]
            pipe(["a hamburger"] * batch, size=size, generator=seeds)
        return time.perf_counter() - start

    cases = sorted({case for found in CASES.values() for case in found})
    for case in cases:
        if case[0] == case[1]:
            taken(*case)
    found = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            found[case].append(taken(*case))
    median = {case: statistics.median(times) for case, times in found.items()}
    print(f"{machine()}; {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| what grows | from | to | s | time grows by | linear would be |\n|---|---|---|---|---|---|")
    for name, series in CASES.items():
        for before, after in zip(series, series[1:], strict=False):
            grown, linear = median[after] / median[before], amount(name, after) / amount(name, before)
            sides = (f"{scale(name, case)}" for case in (before, after))
            print(f"| {name} | {' | '.join(sides)} | {median[after]:.2f} | {grown:.2f} | {linear:g} |")
    plot(median, options.out)


def scale(name: str, case: tuple[int, int, int]) -> int:
    return case[2] if name == "size" else case[0]


def amount(name: str, case: tuple[int, int, int]) -> int:
    """What linear time would be linear in: images or pixels."""
    return case[2] ** 2 if name == "size" else case[0]


def plot(median: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CASES), figsize=(11, 3.4), layout="constrained")
    for axis, (name, series) in zip(axes, CASES.items(), strict=True):
        at, times = [scale(name, case) for case in series], [median[case] for case in series]
        linear = [times[0] * amount(name, case) / amount(name, series[0]) for case in series]
        axis.plot(at, times, "o-", label="measured")
        axis.plot(at, linear, "--", color="grey", label="linear")
        axis.set(xlabel=name, ylabel="seconds", xscale="log", yscale="log", xticks=at, xticklabels=at)
        axis.set(yticks=[])
        axis.minorticks_off()
        for place, taken in zip(at, times, strict=True):
            axis.annotate(f"{taken:.1f}", (place, taken), xytext=(0, -13), textcoords="offset points", ha="center")
        axis.margins(0.1, 0.12)
        axis.legend()
    figure.savefig(out, dpi=110)
    print(f"\n{out}")


if __name__ == "__main__":
    main()
