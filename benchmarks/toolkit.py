"""An image for every tool of the latent toolkit, and the figures that go with them.

    python benchmarks/toolkit.py [TOOL ...] [--model emoji] [--out docs/toolkit]
    python benchmarks/toolkit.py --figures 16 [--model emoji]

Draws the README's images, DIR/TOOL.png: each tool on what the model itself draws, seed 0, nothing selected. With
`--figures` it draws none of them, but says of N generated images how well they come back from their own noise, how far they
depart as eta grows, and whether repainting keeps what it is to keep.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from unclip import (
    CLIP,
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPInterpolationPipeline,
    UnCLIPPCAPipeline,
    UnCLIPPipeline,
    UnCLIPTextDiffPipeline,
)
from unclip.clip.search import Index, classify
from unclip.diffusion.latents import PrincipalAxes
from unclip.evaluation.metrics import psnr
from unclip.io.checkpoints import resolve
from unclip.io.hub import AXES_FILE
from unclip.io.images import with_margins
from unclip.pipelines.rerank import rerank

SUBJECTS = (
    *("red apple", "tiger face", "rocket", "blue heart", "pizza", "crown", "sunflower", "ghost"),
    *("banana", "penguin", "soccer ball", "house", "cherries", "frog", "airplane", "red heart"),
    *("hamburger", "octopus", "bicycle", "rose", "cookie", "cat face", "mushroom", "key"),
)
ETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CELL, LABEL, WIDE, GAP = 120, 18, 8, 6

Row = list[tuple[str, Image.Image]]  # images with what is said under each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"{', '.join(TOOLS)}; default: all")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("docs/toolkit"), metavar="DIR")
    parser.add_argument("--figures", type=int, default=0, metavar="N")
    options = parser.parse_args()
    for name in options.tools:
        if name not in TOOLS:
            parser.error(f"unknown tool {name!r}; choose from {', '.join(TOOLS)}")
    bench = Bench(options.model)
    if options.figures:
        figures(bench, options.figures)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.tools or TOOLS:
        path = options.out / f"{name}.png"
        page(TOOLS[name](bench)).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(path, flush=True)


def seeded(count: int = 1) -> list[torch.Generator]:
    """Seeds 0, 1, ... of `count` images."""
    return [torch.Generator().manual_seed(n) for n in range(count)]


class Bench:
    """The model, its tools over the same networks, and what it draws of a prompt with seed 0."""

    def __init__(self, model: str):
        self.model, self.pipe = model, UnCLIPPipeline.from_pretrained(model)
        self.pipe.set_progress_bar_config(disable=True)

    def tool(self, kind: type):
        made = kind.from_pipe(self.pipe)
        made.set_progress_bar_config(disable=True)
        return made

    def drawn(self, *prompts: str, size: int = 256) -> list[Image.Image]:
        """Eight at a time, each from seed 0."""
        images = []
        for start in range(0, len(prompts), 8):
            chunk = list(prompts[start : start + 8])
            images += self.pipe(chunk, generator=[seeded()[0] for _ in chunk], size=size).images
        return images


# ---------------------------------------------------------------------------------------------- an image for each tool


def variations(bench: Bench) -> list[Row]:
    """From new noise; from the image's own, but for ever more of it; and steered by a sentence."""
    apple, tiger = bench.drawn("a red apple", "a tiger face")
    vary = bench.tool(UnCLIPImageVariationPipeline)
    others = vary(tiger, num_images_per_prompt=WIDE - 1, generator=seeded(WIDE - 1), size=256).images
    inverted = [vary(apple, eta=eta, generator=seeded(), size=256).images[0] for eta in ETAS]
    steered = vary(apple, prompt="a green apple", generator=seeded(), size=256).images[0]
    return [
        [("the image", tiger), *((f"seed {n}", image) for n, image in enumerate(others))],
        [
            ("the image", apple),
            *((f"eta {eta:g}", image) for eta, image in zip(ETAS, inverted, strict=True)),
            ('"a green apple"', steered),
        ],
    ]


def interpolation(bench: Bench) -> list[Row]:
    """Image to image, with one noise and with each end's own; sentence to sentence; image to sentence; three ways."""
    apple, tiger = bench.drawn("a red apple", "a tiger face")
    between = bench.tool(UnCLIPInterpolationPipeline)
    rows = []
    for ends, noise in (
        ((apple, tiger), "fixed"),
        ((apple, tiger), "interpolated"),
        (("a rocket", "a penguin"), "fixed"),
        ((tiger, "a sunflower"), "fixed"),
    ):
        path = between(list(ends), steps=WIDE, noise=noise, generator=seeded()[0], size=256).images
        middle = [f"{n / (WIDE - 1):.2f}" for n in range(1, WIDE - 1)]
        a_image = "an image" if noise == "fixed" else "an image, own noise"
        said = [f'"{end}"' if isinstance(end, str) else a_image for end in ends]
        rows.append(list(zip([said[0], *middle, said[1]], path, strict=True)))
    three = ["a red apple", "a tiger face", "a blue heart"]
    weights = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [2, 1, 1]]
    mixed = between(three, weights=weights, generator=seeded()[0], size=256).images
    said = [*(f'"{end}"' for end in three), *(":".join(map(str, row)) for row in weights[3:])]
    rows.append(list(zip(said, mixed, strict=True)))
    return rows


def edit(bench: Bench) -> list[Row]:
    """Farther and farther towards the difference of two sentences."""
    shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    change, rows = bench.tool(UnCLIPTextDiffPipeline), []
    for source, target in (("a red apple", "a green apple"), ("a tiger face", "a tiger face on a blue background")):
        image = bench.drawn(source)[0]
        drawn = change(image, target, source, shares, generator=seeded()[0], size=256).images
        rows.append([("the image", image), *((f"{share:g}", after) for share, after in zip(shares, drawn, strict=True))])
    return rows


def inpainting(bench: Bench) -> list[Row]:
    """A rectangle and a free shape drawn anew; what lies beyond the edges."""
    apple, tiger = bench.drawn("a red apple", "a tiger face")
    repaint = bench.tool(UnCLIPInpaintPipeline)
    rectangle, free = Image.new("L", apple.size), Image.new("L", apple.size)
    rectangle.paste(255, (128, 0, 256, 256))
    ImageDraw.Draw(free).ellipse((40, 110, 216, 256), fill=255)
    canvas, beyond = with_margins(tiger.crop((64, 64, 192, 192)), 64, 64, 64, 64)
    rows = []
    for prompt, image, mask in (
        ("a red apple", apple, rectangle),
        ("a green apple", apple, rectangle),
        ("a tiger face", tiger, free),
        ("a tiger face", canvas, beyond),
    ):
        drawn = repaint(prompt, image, mask, num_images_per_prompt=3, generator=seeded(3), size=256).images
        shown = Image.composite(Image.new("RGB", image.size, "#b8b8b8"), image, mask)
        row = [("the image", image), ("grey: to be drawn", shown)]
        rows.append([*row, (f'"{prompt}"', drawn[0]), *((f"seed {n}", other) for n, other in enumerate(drawn[1:], 1))])
    return [rows[0] + rows[1][2:5], rows[2] + rows[3][1:4]]


def pca(bench: Bench) -> list[Row]:
    """Ever more of the embedding's principal components, from the same noise."""
    axes = PrincipalAxes.load(resolve(bench.model) / AXES_FILE)
    counts = [k for k in (0, 5, 10, 20, 40, 80, 160) if k < len(axes.axes)] + [len(axes.axes)]
    probe, rows = bench.tool(UnCLIPPCAPipeline), []
    for image in bench.drawn("a tiger face", "a rocket"):
        drawn = probe(image, axes, counts, generator=seeded()[0], size=256).images
        rows.append([(f"{count} components", after) for count, after in zip(counts, drawn, strict=True)])
    return rows


def prior(bench: Bench) -> list[Row]:
    """What stands for the image embedding: the prior's, the text's own, none."""
    prompts, rows = ["a red apple", "a tiger face", "a rocket", "a sunflower", "two cats", "a blue heart", "a hamburger"], []
    texts = bench.pipe.clip.encode_text(prompts)
    for name, settings in (
        ("prior", {}),
        ("text", {"image_embeds": texts}),
        ("none", {"prior": "none"}),
    ):
        drawn = bench.pipe(prompts, generator=[seeded()[0] for _ in prompts], size=256, **settings).images
        rows.append([(f"{name}: {prompts[n]}" if n == 0 else prompts[n], image) for n, image in enumerate(drawn)])
    return rows


def best_of_many(bench: Bench) -> list[Row]:
    """The best and the worst of 32 in CLIP's eyes, as each was drawn."""
    prompt, count = "a pizza", 32
    ranked = rerank(bench.pipe, prompt, count, count, batch=16)
    rows = []
    for chosen in (ranked[:WIDE], ranked[-WIDE:]):
        seeds = [torch.Generator().manual_seed(seed) for _, seed in chosen]
        drawn = bench.pipe([prompt] * len(seeds), generator=seeds, size=256).images
        rows.append([(f"{score:.3f}, seed {seed}", image) for (score, seed), image in zip(chosen, drawn, strict=True)])
    return rows


def labels(bench: Bench) -> list[Row]:
    """Which of all subjects CLIP finds first for an image."""
    drawn, clip = bench.drawn(*SUBJECTS[:WIDE]), CLIP.from_pretrained(bench.model)
    row = []
    for image in drawn:
        best = classify(clip, image, list(SUBJECTS))
        row.append((f"{best[0][1]} {best[0][0]:.2f}", image))
    return [row]


def searching(bench: Bench) -> list[Row]:
    """The nearest of 24 images to sentences, and to an image."""
    rows, clip = [], CLIP.from_pretrained(bench.model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        folder.mkdir()
        for name, image in zip(SUBJECTS, bench.drawn(*SUBJECTS), strict=True):
            image.save(folder / f"{name}.png")
        index = Index(folder, clip, place)
        index.update()
        rose = Image.open(folder / "rose.png")
        for said, query in (('"something red"', None), ('"fruit"', None), ('"a face"', None), ("an image", rose)):
            found = index.search(query or said.strip('"'), WIDE - 1)
            first = rose if query else Image.new("RGB", (256, 256), "white")
            rows.append([(said, first), *((f"{score:.3f}", Image.open(folder / name).copy()) for score, name in found)])
    return rows


def clip_guidance(bench: Bench) -> list[Row]:
    """The same seed, pulled ever more to where CLIP sees the sentence."""
    strengths, rows = (0.0, 0.05, 0.1, 0.2, 0.4), []
    for prompt in ("a crown", "a cat face"):
        row = []
        for strength in strengths:
            image = bench.pipe(prompt, generator=seeded(), clip_guidance=strength, size=256).images[0]
            seen = bench.pipe.clip.encode_image(image)[0] @ bench.pipe.clip.encode_text(prompt)[0]
            row.append((f"{strength:g}: cosine {seen:.3f}", image))
        rows.append(row)
    return rows


TOOLS: dict[str, Callable[[Bench], list[Row]]] = {
    "variations": variations,
    "interpolation": interpolation,
    "edit": edit,
    "inpainting": inpainting,
    "pca": pca,
    "prior": prior,
    "rerank": best_of_many,
    "classify": labels,
    "search": searching,
    "clip_guidance": clip_guidance,
}


def page(rows: list[Row]) -> Image.Image:
    """Rows of images, each with its words under it."""
    width = max(map(len, rows)) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (CELL + LABEL + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for n, row in enumerate(rows):
        top = GAP + n * (CELL + LABEL + GAP)
        for k, (said, image) in enumerate(row):
            left = GAP + k * (CELL + GAP)
            fitted = image.convert("RGB")
            fitted.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (left + (CELL - fitted.width) // 2, top + (CELL - fitted.height) // 2))
            while said and draw.textlength(said, font) > CELL:
                said = said.rstrip("…")[:-1] + "…"
            draw.text((left + CELL / 2, top + CELL + 2), said, fill="black", font=font, anchor="ma")
    return sheet


# ---------------------------------------------------------------------------------------------- figures


def figures(bench: Bench, count: int) -> None:
    """Reconstruction, departure, and what repainting keeps."""
    drawn = bench.pipe([SUBJECTS[n % len(SUBJECTS)] for n in range(count)], generator=seeded(count), size=64).images
    after = again(bench, drawn, 0.0, steps=100)
    scores = psnr(after, stacked(drawn))
    print(f"eta 0, 100 steps, 64 px, {count} images: PSNR {scores.mean():.1f} dB, {scores.min():.1f} dB at least", flush=True)
    departure(bench, drawn)
    kept(bench)


def departure(bench: Bench, drawn: list[Image.Image], steps: int = 25) -> None:
    """How far images come back as eta grows, and how many of them farther than at the eta before."""
    before = None
    for eta in ETAS:
        off = (again(bench, drawn, eta, steps) - stacked(drawn)).square().mean((1, 2, 3)).sqrt()
        farther = "" if before is None else f", farther than at the eta before: {int((off > before).sum())} of {len(drawn)}"
        print(f"eta {eta:g}, {steps} steps: root mean square {off.mean():.4f}{farther}", flush=True)
        before = off


def kept(bench: Bench) -> None:
    """The middle of an image inpainted at every size: how far it and the rest are from what they were."""
    repaint = bench.tool(UnCLIPInpaintPipeline)
    for size in bench.pipe.sizes:
        image = bench.drawn("a red apple", size=size)[0]
        mask = Image.new("L", image.size)
        mask.paste(255, (size // 4, size // 4, size * 3 // 4, size * 3 // 4))
        after = repaint("a crown", image, mask, generator=seeded(), size=size).images[0]
        same = stacked([mask.convert("RGB")]) == 0
        off = (stacked([image]) - stacked([after])).abs()
        print(
            f"inpaint, {size} px: kept part off by {off[same].max():.6f} at most, new part by {off[~same].mean():.3f}",
            flush=True,
        )


def again(bench: Bench, images: list[Image.Image], eta: float, steps: int) -> torch.Tensor:
    """Images from their own noise, [N, 3, 64, 64] in [0, 1]."""
    vary, settings = bench.tool(UnCLIPImageVariationPipeline), {"decoder_num_inference_steps": steps, "size": 64}
    return stacked(vary(images, eta=eta, generator=seeded(len(images)), **settings).images)


def stacked(images: list[Image.Image]) -> torch.Tensor:
    """[N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([np.array(p) for p in images])).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    main()
