"""The prior's sampling loop at Karlo's width beside diffusers' `PriorTransformer` called as its pipelines call it.

    python benchmarks/prior_loop.py [--layers 6] [--batch 1 8] [--rounds 5] [--tokens 77]

Both run the same random weights, in turn, after a warm-up: 25 steps, guidance, float32, medians. `--tokens` is the length of
the text; what is padding on top of it, up to 77, only the uncached loop has to carry.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import PriorTransformer
from torch import Tensor

from prior.cache import predictor
from unclip import attention
from unclip.convert import prior_scheduler
from unclip.sampling import denoise

STEPS, GUIDANCE, TOKENS = 25, 4.0, 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[12, TOKENS])
    options = parser.parse_args()
    torch.manual_seed(0)
    stock = PriorTransformer(num_layers=options.layers).eval()
    for parameter in stock.parameters():
        parameter.data.normal_(0, 0.02)
    ours = attention.install(PriorTransformer(num_layers=options.layers).eval())
    ours.load_state_dict(stock.state_dict())
    print(f"{torch.get_num_threads()} threads, {options.layers} layers of width 2048, {STEPS} steps, guidance, float32")
    print("| batch | tokens of text | diffusers, s | ours, s | ratio (least to largest) | largest difference |")
    print("|---|---|---|---|---|---|")
    for batch in options.batch:
        for tokens in options.tokens:
            print(compare(stock, ours, batch, tokens, options.rounds), flush=True)


@torch.no_grad()
def compare(stock: PriorTransformer, ours: PriorTransformer, batch: int, tokens: int, rounds: int) -> str:
    g = torch.Generator().manual_seed(1)
    text, encodings = torch.randn(2 * batch, 768, generator=g), torch.randn(2 * batch, TOKENS, 768, generator=g)
    mask = (torch.arange(TOKENS) < tokens).expand(2 * batch, -1)
    start = torch.randn(batch, 768, generator=g)

    def uncached() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: stock(x, t, text, encodings, mask).predicted_image_embedding

    def cached() -> Callable[[Tensor, Tensor], Tensor]:
        return predictor(ours, text, encodings, mask)

    def timed(make: Callable) -> tuple[float, Tensor]:
        begun = time.perf_counter()
        drawn = denoise(make(), start, prior_scheduler(), STEPS, guidance=GUIDANCE, generator=torch.Generator().manual_seed(2))
        return time.perf_counter() - begun, drawn

    timed(uncached), timed(cached)
    pairs = [(timed(uncached), timed(cached)) for _ in range(rounds)]
    ratios = sorted(a[0] / b[0] for a, b in pairs)
    slow, fast = (statistics.median(run[0] for run in runs) for runs in zip(*pairs, strict=True))
    difference = (pairs[0][0][1] - pairs[0][1][1]).abs().max()
    ratio = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    return f"| {batch} | {tokens} | {slow:.2f} | {fast:.2f} | {ratio} | {difference:.1e} |"


if __name__ == "__main__":
    main()
