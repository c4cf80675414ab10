"""How far a picture enlarged in tiles is from the same picture enlarged whole, with the shipped upsamplers.

    python benchmarks/seams.py [--prompt P] [--side 2048] [--device D]

Draws one picture of twice its upsamplers' sides (the tiles are those sides) both ways from the same noise, and prints the
largest and the mean difference (pixels in [0, 1]), and how much steeper the tiled picture is over its seams than the whole
one is there (1 = no seam shows).
"""

import argparse
from unittest import mock

import torch

from unclip import UnCLIPPipeline
from unclip.pipelines.base import TILE_OVERLAP
from unclip.precision import best_device
from unclip.tiling import spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--device", default=str(best_device()))
    options = parser.parse_args()
    pipe = UnCLIPPipeline.from_pretrained("emoji", dtype=torch.float32).to(options.device)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        side = {"height": options.side, "width": options.side}
        return pipe(options.prompt, generator=generator, output_type="pt", **side).images[0].cpu()

    tiled = draw()
    with mock.patch("unclip.pipelines.base.tiled", lambda network, x, *sizes: network(x)):
        whole = draw()
    error = (tiled - whole).abs()
    tile = pipe.sizes[-1]
    borders = [edge for span in spans(options.side, tile, int(tile * TILE_OVERLAP), 1) for edge in span]
    seams = sorted(b for b in borders if 0 < b < options.side)
    steep = [picture.diff(dim=-1).abs().mean((0, 1))[[s - 1 for s in seams]].mean().item() for picture in (tiled, whole)]
    print(f"{options.side}x{options.side} from tiles of {tile}, float32, seed 0, {options.prompt!r}")
    print(f"largest difference {error.max():.2e}, mean {error.mean():.2e}")
    print(f"steepness over the seams at {seams}: {steep[0]:.2e} tiled, {steep[1]:.2e} whole, ratio {steep[0] / steep[1]:.3f}")


if __name__ == "__main__":
    main()
