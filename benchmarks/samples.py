"""Draw the README's contact sheet: `python benchmarks/samples.py [--model emoji] [--out docs/samples.png]`.

48 prompts, each with seed 0, nothing selected: 32 name concepts that were in training, 16 combinations that were held
out. With `--data data/emoji` it prints, for the first 32, at which place the model's own CLIP ranks the right name among all.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from words import broken

from unclip import CLIP, UnCLIPPipeline
from unclip.data.scenes import IconSet

CONCEPTS = (
    "red apple, pizza, rocket, octopus, cat face, dog face, rose, banana, guitar, soccer ball, sunflower, penguin, "
    "hamburger, cherries, crown, umbrella, light bulb, teddy bear, cactus, frog, cookie, key, airplane, red heart, "
    "smiling face with sunglasses, ghost, jack-o-lantern, tiger face, mushroom, whale, bicycle, house"
)
HELD_OUT = [
    "a purple octopus",
    "a green crown",
    "a pink frog",
    "a purple teddy bear",
    "two airplanes",
    "three pears",
    "four dolphins",
    "five basketballs",
    "an owl to the left of a pizza",
    "a crown on top of a dog",
    "a fish below a house",
    "a frog above an octopus",
    "a guitar and a pizza",
    "a mushroom on a blue background",
    "a light bulb on a yellow background",
    "a penguin in noto style",
]
SIX = ["hamburger", "cherries", "frog", "umbrella", "three pears", "a pink frog"]  # chosen, for the README
COLUMNS, CELL = 8, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("docs/samples.png"))
    parser.add_argument("--data", type=Path, help="what `unclip data emoji` built: rank the images against its names")
    parser.add_argument("--six", action="store_true", help="only the six images of the README, larger")
    arguments = parser.parse_args()
    concepts = [c.strip() for c in CONCEPTS.split(",")]
    prompts = SIX if arguments.six else concepts + HELD_OUT
    pipe = UnCLIPPipeline.from_pretrained(arguments.model)
    images = []
    for start in range(0, len(prompts), 8):
        chunk = prompts[start : start + 8]
        generators = [torch.Generator().manual_seed(0) for _ in chunk]
        images += pipe(chunk, generator=generators, size=256).images
    shape = (6, 213) if arguments.six else (COLUMNS, CELL)
    sheet(prompts, images, *shape).quantize(256, dither=Image.Dither.NONE).save(arguments.out, optimize=True)
    print(arguments.out)
    if arguments.data:
        rank(concepts, images, IconSet.load(arguments.data).concepts, CLIP.from_pretrained(arguments.model))


def sheet(prompts: list[str], images: list[Image.Image], columns: int = COLUMNS, cell: int = CELL) -> Image.Image:
    """The images in rows of `columns`, each in `cell` pixels with its margin, and their prompts below."""
    rows = -(-len(prompts) // columns)
    page = Image.new("RGB", (columns * cell, rows * (cell + 28)), "white")
    draw = ImageDraw.Draw(page)
    for n, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        left, top = n % columns * cell, n // columns * (cell + 28)
        page.paste(image.resize((cell - 8, cell - 8), Image.Resampling.LANCZOS), (left + 4, top + 2))
        for number, line in enumerate(broken(prompt, cell - 8, draw)[:2]):
            draw.text((left + 6, top + cell - 4 + 12 * number), line, fill="black")
    return page


def rank(concepts: list[str], images: list[Image.Image], names: list[str], clip: CLIP) -> None:
    scores = clip.encode_image(images[: len(concepts)]) @ clip.encode_text(names).T
    own = scores[torch.arange(len(concepts)), [names.index(c) for c in concepts]]
    places = ((scores > own[:, None]).sum(1) + 1).tolist()
    for concept, place in zip(concepts, places, strict=True):
        print(f"{concept}: {place}")
    print(f"first: {sum(p == 1 for p in places)}, in the first five: {sum(p <= 5 for p in places)}, of {len(concepts)} images")
    print(f"ranked among {len(names)} names")


if __name__ == "__main__":
    main()
