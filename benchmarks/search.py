"""Time of indexing and searching a folder of images: `python benchmarks/search.py [--built 2000] [--indexed 100000]`.

Draws `--built` images of 256 px, no two alike, indexes their folder, then fills the index up to `--indexed` rows and searches
it by a sentence and by an image; medians of nine queries, the tower's time included.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from unclip import CLIP
from unclip.clip.search import Index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--built", type=int, default=2000)
    parser.add_argument("--indexed", type=int, default=100_000)
    options = parser.parse_args()
    clip = CLIP.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place) / "pictures", Path(place) / "cache"
        folder.mkdir()
        for number in range(options.built):
            draw_one(number).save(folder / f"{number:06d}.png")
        index = Index(folder, clip, cache)
        took = seconds(index.update)
        print(f"building: {options.built} images of 256 px in {took:.1f} s, {options.built / took:.0f} a second")
        print(f"nothing new: {seconds(index.update):.2f} s")
        rows = torch.arange(options.indexed) % options.built
        index.embeddings = index.embeddings[rows] + 0.01 * torch.randn(options.indexed, index.embeddings.shape[1])
        index.stamps = {f"{n:06d}.png": [0, 0] for n in range(options.indexed)}
        for kind, query in (("a sentence", "a red circle"), ("an image", draw_one(7))):
            times = [seconds(lambda query=query: index.search(query)) for _ in range(10)][1:]
            print(f"searching {options.indexed} images by {kind}: {1000 * statistics.median(times):.1f} ms")


def draw_one(number: int) -> Image.Image:
    """A disc whose place, size and colour tell its number."""
    image = Image.new("RGB", (256, 256), "white")
    x, y, size = number % 16 * 12, number // 16 % 16 * 12, 20 + number // 256 % 40
    colour = (number * 37 % 256, number * 91 % 256, number * 151 % 256)
    ImageDraw.Draw(image).ellipse((x, y, x + size, y + size), fill=colour)
    return image


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
