"""Training on a folder of 200 captioned images up to samples, timed, as in docs/train_your_own.md; with a sheet of samples.

    python benchmarks/own_images.py [--folder out/own] [--out docs/own_images.png]

The script renders the images, robots: eight colours, one to three eyes, with and without an aerial; the prompts of the
samples are combinations that are in none of them. Runs the commands as the README has them, each in a process of its own.
"""

import argparse
import itertools
import random
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 48, 49),
    "orange": (230, 126, 34),
    "yellow": (241, 196, 15),
    "green": (39, 174, 96),
    "blue": (41, 128, 185),
    "purple": (142, 68, 173),
    "brown": (121, 85, 72),
    "grey": (127, 140, 141),
}
EYES = {1: "one eye", 2: "two eyes", 3: "three eyes"}
HELD_OUT = [("red", 3, True), ("orange", 1, False), ("yellow", 2, True), ("green", 1, True)]
HELD_OUT += [("blue", 3, False), ("purple", 2, False), ("brown", 1, True), ("grey", 3, True)]
COUNT, SIDE, CELL = 200, 256, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/own"))
    parser.add_argument("--out", type=Path, default=Path("docs/own_images.png"))
    options = parser.parse_args()
    images, runs = options.folder / "my-images", options.folder / "runs"
    draw_all(images)
    embeddings, model = options.folder / "my-embeddings", options.folder / "my-model"
    common = [f"data.path={images}", f"data.embeddings={embeddings}", "init_from=emoji", "objective.clip=emoji"]
    prior = ["max_steps=300", "batch_size=32", "learning_rate=1e-4", "objective.whitening_examples=128"]
    timed("embed", images, embeddings)
    timed("train", "emoji/prior", *common, f"output_dir={runs / 'prior'}", *prior)
    timed("train", "emoji/decoder", *common, f"output_dir={runs / 'decoder'}", "max_steps=150", "learning_rate=2e-4")
    timed("plot", runs / "prior", runs / "decoder", "--out", options.folder / "curves.png")
    timed("export", "emoji", runs / "prior", runs / "decoder", model)
    prompts = [caption(*kind) for kind in HELD_OUT]
    for name, kind in (("before", "emoji"), ("after", model)):
        timed("generate", *prompts, "--size", "256", "--model", kind, "--out", options.folder / name)
    rows = [
        [Image.open(p) for p in sorted(images.glob("*.png"))[: len(HELD_OUT)]],
        *([Image.open(p) for p in written(options.folder / name, prompts)] for name in ("before", "after")),
    ]
    sheet(rows, prompts).save(options.out, optimize=True)
    print(options.out)


def timed(*words: object) -> None:
    command = [sys.executable, "-m", "unclip", *map(str, words)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{time.perf_counter() - start:6.0f} s  unclip {' '.join(map(str, words))[:100]}", flush=True)


def draw_all(folder: Path) -> None:
    """200 robots with their captions, the held-out combinations in none of them."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [k for k in itertools.product(COLOURS, EYES, (False, True)) if k not in HELD_OUT]
    rng = random.Random(0)
    for number in range(COUNT):
        kind = kinds[number % len(kinds)]
        robot(*kind, rng).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption(*kind) + "\n")


def caption(colour: str, eyes: int, aerial: bool) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} robot with {EYES[eyes]}{' and an aerial' if aerial else ''}"


def robot(colour: str, eyes: int, aerial: bool, rng: random.Random) -> Image.Image:
    """On white, a little smaller or larger and somewhere near the middle."""
    scale = 4  # drawn larger and reduced, for smooth edges
    page = Image.new("RGB", (SIDE * scale,) * 2, "white")
    draw = ImageDraw.Draw(page)
    unit = scale * SIDE * rng.uniform(0.85, 1.0) / 100
    left, top = ((SIDE * scale - 100 * unit) * rng.random() for _ in range(2))

    def box(x0: float, y0: float, x1: float, y1: float, fill, round_: float = 4) -> None:
        corners = (left + x0 * unit, top + y0 * unit, left + x1 * unit, top + y1 * unit)
        draw.rounded_rectangle(corners, round_ * unit, fill)

    main_colour, dark = COLOURS[colour], tuple(int(c * 0.6) for c in COLOURS[colour])
    if aerial:
        box(48.5, 6, 51.5, 22, dark, 1)
        box(45, 2, 55, 12, (231, 76, 60), 5)
    box(28, 20, 72, 50, main_colour, 8)  # head
    for n in range(eyes):
        middle = 50 + (n - (eyes - 1) / 2) * 13
        box(middle - 5, 28, middle + 5, 38, "white", 5)
        box(middle - 2, 31, middle + 2, 35, "black", 2)
    box(38, 42, 62, 45, dark, 1)  # mouth
    box(32, 53, 68, 82, main_colour, 5)  # body
    box(42, 60, 58, 70, dark, 2)
    box(20, 54, 29, 78, dark, 4)  # arms
    box(71, 54, 80, 78, dark, 4)
    box(36, 84, 46, 97, dark, 3)  # legs
    box(54, 84, 64, 97, dark, 3)
    return page.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def written(folder: Path, prompts: list[str]) -> list[Path]:
    """The images of `unclip generate`, in the order of their prompts."""
    return [next(folder.glob(f"{prompt.replace(' ', '-')}*.png")) for prompt in prompts]


def sheet(rows: list[list[Image.Image]], prompts: list[str]) -> Image.Image:
    names = ("of the 200 images", "the shipped model", "after training: these combinations are in none of the images")
    page = Image.new("RGB", (len(prompts) * CELL, len(rows) * (CELL + 20) + 34), "white")
    draw = ImageDraw.Draw(page)
    for n, (name, row) in enumerate(zip(names, rows, strict=True)):
        draw.text((4, n * (CELL + 20) + 4), name, fill="black")
        for k, image in enumerate(row):
            page.paste(image.resize((CELL - 6,) * 2, Image.Resampling.LANCZOS), (k * CELL + 3, n * (CELL + 20) + 20))
    for k, prompt in enumerate(prompts):
        words = prompt.split(" with ")
        for line, part in enumerate((words[0], "with", words[1])[:3:2]):
            draw.text((k * CELL + 4, len(rows) * (CELL + 20) + 2 + 14 * line), part, fill="black")
    return page


if __name__ == "__main__":
    main()
