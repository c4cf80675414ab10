"""Draw 100 images of 256 px on one sheet, and three of 1024 px in full: `python benchmarks/contact_sheet.py [--out DIR]`.

The first hundred concepts that `unclip evaluate --split test` asks for by name (their order has no meaning), and the first
three of them at 1024 px; image n has the seed n. Nothing is selected. Needs what `unclip data emoji` built.
"""

import argparse
from pathlib import Path

import torch
from samples import sheet
from tqdm import tqdm

from unclip import UnCLIPPipeline
from unclip.data.scenes import IconSet
from unclip.evaluation.prompts import recognition

COUNT, LARGE, BATCH = 100, 3, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--out", type=Path, default=Path("docs/evaluation"))
    options = parser.parse_args()
    prompts = [p.text for p in recognition(IconSet.load(options.data), "test")[:COUNT]]
    pipe = UnCLIPPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    options.out.mkdir(parents=True, exist_ok=True)

    def draw(start: int, stop: int, size: int) -> list:
        generators = [torch.Generator().manual_seed(n) for n in range(start, stop)]
        return pipe(prompts[start:stop], generator=generators, size=size).images

    small = []
    for start in tqdm(range(0, len(prompts), BATCH), unit="batch"):
        small += draw(start, min(start + BATCH, len(prompts)), 256)
    page = sheet(prompts, small, 10, 256 + 8)
    page.save(options.out / "contact_sheet.webp", quality=85, method=6)
    for n in range(LARGE):
        draw(n, n + 1, 1024)[0].save(options.out / f"{prompts[n].replace(' ', '_')}_1024.webp", quality=90, method=6)
    for path in sorted(options.out.glob("*.webp")):
        print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
