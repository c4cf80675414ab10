"""The prior's sampling loop at Karlo's width beside diffusers' `PriorTransformer` called as its pipelines call it.

    python benchmarks/prior_loop.py [--layers 6] [--batch 1 8] [--rounds 5] [--tokens 12 77] [--timed 5] [--device cuda]

Both run the same random weights, in turn, after a warm-up: 25 steps, guidance, float32, medians. Every step of diffusers' is
alike, so that of its 25 only `--timed` are taken, and their time is multiplied; ours, which begins with its text, is taken in
full. `--tokens` is the length of the text; what is padding on top of it, up to 77, only the uncached loop has to carry.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from diffusers import PriorTransformer
from torch import Tensor
from turns import machine, now, spread

from prior.cache import predictor
from unclip.diffusion.sampling import DenoisingOptions, denoise
from unclip.pipelines.convert import prior_scheduler
from unclip.runtime import attention

STEPS, GUIDANCE, TOKENS = 25, 4.0, 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[12, TOKENS])
    parser.add_argument("--timed", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    stock = PriorTransformer(num_layers=options.layers).eval().to(options.device)
    for parameter in stock.parameters():
        parameter.data.normal_(0, 0.02)
    ours = attention.install(PriorTransformer(num_layers=options.layers).eval().to(options.device))
    ours.load_state_dict(stock.state_dict())
    print(f"{machine(options.device)}; {torch.get_num_threads()} threads")
    print(f"{options.layers} layers of width 2048, {STEPS} steps, guidance, float32")
    print("| batch | tokens of text | diffusers, s | ours, s | ratio (least to largest) | largest difference |")
    print("|---|---|---|---|---|---|")
    for batch in options.batch:
        for tokens in options.tokens:
            print(compare(stock, ours, batch, tokens, options), flush=True)


@torch.no_grad()
def compare(stock: PriorTransformer, ours: PriorTransformer, batch: int, tokens: int, options: argparse.Namespace) -> str:
    g, rounds, steps, device = torch.Generator().manual_seed(1), options.rounds, options.timed, options.device
    text, encodings = torch.randn(2 * batch, 768, generator=g), torch.randn(2 * batch, TOKENS, 768, generator=g)
    mask = (torch.arange(TOKENS) < tokens).expand(2 * batch, -1)
    start = torch.randn(batch, 768, generator=g)
    text, encodings, mask, start = (t.to(device) for t in (text, encodings, mask, start))

    def uncached() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: stock(x, t, text, encodings, mask).predicted_image_embedding

    def cached() -> Callable[[Tensor, Tensor], Tensor]:
        return predictor(ours, text, encodings, mask)

    def timed(make: Callable, steps: int) -> tuple[float, Tensor]:
        begun = now(device)
        options = DenoisingOptions(guidance=GUIDANCE, generator=torch.Generator().manual_seed(2))
        drawn = denoise(make(), start, prior_scheduler(), steps, options)
        return now(device) - begun, drawn

    difference = (timed(uncached, steps)[1] - timed(cached, steps)[1]).abs().max()  # and both are warm
    slow, fast = [], []
    for _ in range(rounds):
        slow.append(timed(uncached, steps)[0] * STEPS / steps)
        fast.append(timed(cached, STEPS)[0])
    times = f"{statistics.median(slow):.3g} | {statistics.median(fast):.3g}"
    return f"| {batch} | {tokens} | {times} | {spread(slow, fast)} | {difference:.1e} |"


if __name__ == "__main__":
    main()
