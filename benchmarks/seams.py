"""Visibility of seams between tiles, and between kept and inpainted parts, with the shipped model.

    python benchmarks/seams.py [--prompt P] [--side 2048] [--device D]
    python benchmarks/seams.py --repaint N [--prompt P]

The first draws one image of twice its upsamplers' sides (the tiles are those sides) in tiles and whole, from the same noise,
and prints the largest and the mean difference (pixels in [0, 1]), and how much steeper the tiled image is over its seams
than the whole one is there (1 = no seam shows). The second inpaints the middle of N images and outpaints N images at every
size, and prints how much steeper they are over the mask's border than beside it, and than the unpainted images are over it.
"""

import argparse
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip import UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.diffusion.tiling import spans
from unclip.io.images import with_margins
from unclip.pipelines.stages.upsamplers import TILE_OVERLAP
from unclip.runtime.precision import best_device

BESIDE = 4  # steps on either side of the border that it is compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--repaint", type=int, default=0, metavar="N")
    parser.add_argument("--device", default=str(best_device()))
    options = parser.parse_args()
    if options.repaint:
        pipe = UnCLIPPipeline.from_pretrained("emoji").to(options.device)
        repainted(pipe, options.prompt, options.repaint)
    else:
        pipe = UnCLIPPipeline.from_pretrained("emoji", dtype=torch.float32).to(options.device)
        in_tiles(pipe, options.prompt, options.side)


def in_tiles(pipe: UnCLIPPipeline, prompt: str, side: int) -> None:
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, generator=generator, output_type="pt", height=side, width=side).images[0].cpu()

    tiled = draw()
    with mock.patch("unclip.pipelines.stages.upsamplers.tiled", lambda network, x, *sizes: network(x)):
        whole = draw()
    error = (tiled - whole).abs()
    tile = pipe.sizes[-1]
    borders = [edge for span in spans(side, tile, int(tile * TILE_OVERLAP), 1) for edge in span]
    seams = sorted(b for b in borders if 0 < b < side)
    steep = [image.diff(dim=-1).abs().mean((0, 1))[[s - 1 for s in seams]].mean().item() for image in (tiled, whole)]
    print(f"{side}x{side} from tiles of {tile}, float32, seed 0, {prompt!r}")
    print(f"largest difference {error.max():.2e}, mean {error.mean():.2e}")
    print(f"steepness over the seams at {seams}: {steep[0]:.2e} tiled, {steep[1]:.2e} whole, ratio {steep[0] / steep[1]:.3f}")


def repainted(pipe: UnCLIPPipeline, prompt: str, count: int) -> None:
    repaint = UnCLIPInpaintPipeline.from_pipe(pipe)
    for one in (pipe, repaint):
        one.set_progress_bar_config(disable=True)
    for size in pipe.sizes:
        generators = [torch.Generator().manual_seed(n) for n in range(count)]
        images = pipe([prompt] * count, generator=generators, size=size).images
        for what in ("inpainted", "outpainted"):
            found = []
            for seed, image in enumerate(images):
                if what == "inpainted":
                    given, mask = image, Image.new("L", image.size)
                    mask.paste(255, (size // 4, size // 4, size * 3 // 4, size * 3 // 4))
                else:
                    small = image.resize((size // 2, size // 2), Image.Resampling.BOX)
                    given, mask = with_margins(small, *[size // 4] * 4)
                after = repaint(prompt, given, mask, generator=[torch.Generator().manual_seed(seed)], size=size).images[0]
                found.append([*steepness(after, size), steepness(image, size)[0]])
            border, beside, before = np.mean(found, 0)
            said = f"{border:.4f} over the border, {beside:.4f} beside it (ratio {border / beside:.2f})"
            more = f", {before:.4f} in the image before (ratio {border / before:.2f})" if what == "inpainted" else ""
            print(f"{what} at {size} px, {count} images of {prompt!r}: {said}{more}", flush=True)


def steepness(image: Image.Image, size: int) -> tuple[float, float]:
    """Mean absolute step from pixel to pixel over the sides of the middle square, and beside them, of [0, 1]."""
    pixels = np.asarray(image).astype(np.float32) / 255  # [H, W, 3]
    low, high = size // 4, size * 3 // 4
    over, beside = [], []
    for turned in (pixels, pixels.transpose(1, 0, 2)):
        steps = np.abs(np.diff(turned[low:high], axis=1)).mean((0, 2))  # step n is from pixel n to n + 1
        for edge in (low - 1, high - 1):
            over.append(steps[edge])
            beside += [*steps[edge - BESIDE : edge], *steps[edge + 1 : edge + 1 + BESIDE]]
    return float(np.mean(over)), float(np.mean(beside))


if __name__ == "__main__":
    main()
