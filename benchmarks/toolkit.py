"""A picture for every tool of the latent toolkit, and the figures that go with them.

    python benchmarks/toolkit.py [--model emoji] [--out docs/toolkit.png] [--figures N]

Draws the README's page: each row one tool on the model's own pictures, seed 0, nothing selected. With `--figures` it prints
how well N generated pictures come back from their own noise (64 px, eta 0, 100 steps) and whether repainting keeps what it
is to keep.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from unclip import (
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPInterpolationPipeline,
    UnCLIPPCAPipeline,
    UnCLIPPipeline,
    UnCLIPTextDiffPipeline,
)
from unclip.checkpoints import resolve
from unclip.evaluation.metrics import psnr
from unclip.images import with_margins
from unclip.latents import AXES_FILE, PrincipalAxes
from unclip.rerank import rerank

SUBJECTS = ["red apple", "tiger face", "rocket", "blue heart", "pizza", "crown", "sunflower", "ghost"]
CELL, LABEL, WIDE = 128, 22, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("docs/toolkit.png"))
    parser.add_argument("--figures", type=int, default=0, metavar="N")
    options = parser.parse_args()
    pipe = UnCLIPPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.figures:
        figures(pipe, options.figures)
    page(rows(pipe, options.model)).quantize(256, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(options.out)


def seeded(count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(count)]


def rows(pipe: UnCLIPPipeline, model: str) -> dict[str, list[Image.Image]]:
    """What each tool is called with, and what it draws."""
    size = {"size": 256}
    apple, tiger = pipe(SUBJECTS[:2], generator=[*seeded(), *seeded()], **size).images
    vary, between, change, repaint, probe = (
        kind.from_pipe(pipe)
        for kind in (
            UnCLIPImageVariationPipeline,
            UnCLIPInterpolationPipeline,
            UnCLIPTextDiffPipeline,
            UnCLIPInpaintPipeline,
            UnCLIPPCAPipeline,
        )
    )
    for other in (vary, between, change, repaint, probe):
        other.set_progress_bar_config(disable=True)
    found = {"variations: a picture, and its embedding drawn from new noise": [tiger]}
    found["variations: a picture, and its embedding drawn from new noise"] += vary(
        tiger, num_images_per_prompt=WIDE - 1, generator=seeded(WIDE - 1), **size
    ).images
    etas = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    inverted = [vary(apple, eta=eta, generator=seeded(), **size).images[0] for eta in etas]
    found[f"variations --eta: a picture, and from its own noise with {', '.join(map(str, etas))} of fresh noise"] = [
        apple,
        *inverted,
    ]
    ends = [apple, tiger]
    found["interpolate: from one picture to another"] = between(ends, steps=WIDE, generator=seeded()[0], **size).images
    found['interpolate "a rocket" "a penguin"'] = between(
        ["a rocket", "a penguin"], steps=WIDE, generator=seeded()[0], **size
    ).images
    shares = (0.1, 0.2, 0.3, 0.4, 0.5)
    found['edit --from "a red apple" --to "a green apple", farther and farther'] = [
        apple,
        *change(apple, "a green apple", "a red apple", shares, generator=seeded()[0], **size).images,
    ]
    mask = Image.new("L", apple.size)
    mask.paste(255, (0, 0, 256, 90))
    canvas, beyond = with_margins(tiger, 64, 64, 64, 64)
    found['inpaint "a red apple" (its white part is new), and outpaint "a tiger face"'] = [
        *(apple, mask.convert("RGB"), repaint("a red apple", apple, mask, generator=seeded(), **size).images[0]),
        *(tiger, beyond.convert("RGB"), repaint("a tiger face", canvas, beyond, generator=seeded(), **size).images[0]),
    ]
    axes = PrincipalAxes.load(resolve(model) / AXES_FILE)
    counts = [k for k in (0, 5, 10, 20, 40, 80, 160) if k < len(axes.axes)] + [len(axes.axes)]
    drawn = probe(tiger, axes, counts, generator=seeded()[0], **size).images
    found[f"pca: from the first {', '.join(map(str, counts))} components of its embedding"] = drawn
    best = rerank(pipe, "a pizza", 32, WIDE, batch=16)
    found['rerank "a pizza": the best 8 of 32, as CLIP ranks them'] = [
        pipe("a pizza", generator=[torch.Generator().manual_seed(seed)], **size).images[0] for _, seed in best
    ]
    strengths = (0.0, 0.1, 0.2, 0.4)
    found[f'generate "a crown" --clip-guidance {", ".join(map(str, strengths))}'] = [
        pipe("a crown", generator=seeded(), clip_guidance=s, **size).images[0] for s in strengths
    ]
    return found


def page(found: dict[str, list[Image.Image]]) -> Image.Image:
    """A row of pictures under each name."""
    sheet = Image.new("RGB", (WIDE * CELL, len(found) * (CELL + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (name, pictures) in enumerate(found.items()):
        top = n * (CELL + LABEL)
        draw.text((4, top + 6), name, fill="black")
        for k, picture in enumerate(pictures):
            fitted = picture.resize((CELL - 6, CELL - 6), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (k * CELL + 3, top + LABEL))
    return sheet


def figures(pipe: UnCLIPPipeline, count: int) -> None:
    """Reconstruction and what repainting keeps."""
    prompts = [SUBJECTS[n % len(SUBJECTS)] for n in range(count)]
    drawn = pipe(prompts, generator=seeded(count), size=64).images
    vary = UnCLIPImageVariationPipeline.from_pipe(pipe)
    vary.set_progress_bar_config(disable=True)
    for steps in (50, 100):
        again = vary(drawn, eta=0.0, decoder_num_inference_steps=steps, generator=seeded(count), size=64).images
        scores = [float(psnr(pixels(a)[None], pixels(b)[None]).mean()) for a, b in zip(drawn, again, strict=True)]
        print(
            f"eta 0, {steps} steps, {count} pictures: PSNR {np.mean(scores):.1f} dB on average, {min(scores):.1f} dB at least"
        )
    repaint = UnCLIPInpaintPipeline.from_pipe(pipe)
    repaint.set_progress_bar_config(disable=True)
    for size in pipe.sizes:
        picture = pipe(SUBJECTS[0], generator=seeded(), size=size).images[0]
        mask = Image.new("L", picture.size)
        mask.paste(255, (size // 4, size // 4, size * 3 // 4, size * 3 // 4))
        after = repaint(SUBJECTS[5], picture, mask, generator=seeded(), size=size).images[0]
        kept = pixels(mask.convert("RGB")) == 0
        off = (pixels(picture) - pixels(after)).abs()[kept].max()
        print(f"inpaint at {size} px: the kept part is off by {float(off):.6f} at most (pixels in [0, 1])")


def pixels(picture: Image.Image) -> torch.Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


if __name__ == "__main__":
    main()
