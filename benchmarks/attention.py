"""Attention on this CPU as two batched products, without softmax's maximum between them ("one pass", forward and in bfloat16
alone), and through torch's flash kernel: what `unclip.runtime.attention` chooses by.

    python benchmarks/attention.py [--times 9]

Milliseconds of the fastest of `--times`: of a forward pass, and of one with its backward pass.
"""

import argparse
import time

import torch
from turns import machine

from unclip.runtime.attention import _without_maximum, attention

# images, queries, keys, heads, their width: the shipped decoder guided and at batch 16, Karlo's at a quarter of its width and
# whole, a prior's whole sequence and its three tokens
SHAPES = [(2, 256, 276, 3, 64), (2, 64, 84, 5, 64), (16, 256, 276, 3, 64), (16, 64, 84, 5, 64), (2, 1024, 1044, 10, 16)]
SHAPES += [(2, 256, 276, 15, 16), (2, 64, 84, 20, 16), (2, 1024, 1105, 10, 64), (2, 81, 81, 32, 64), (2, 3, 80, 32, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=9)
    options = parser.parse_args()
    print(f"{machine()}; {torch.get_num_threads()} threads\n")
    ways = {"products": ("math", False), "flash": ("sdpa", False), "one pass": ("one pass", False)}
    ways |= {"products, backward too": ("math", True), "flash, backward too": ("sdpa", True)}
    print(f"| dtype | [images, queries, keys, heads, width] | {' | '.join(ways)} |\n|{'---|' * (2 + len(ways))}")
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            found = []
            for backend, learns in ways.values():
                possible = backend != "one pass" or dtype == torch.bfloat16
                found.append(f"{fastest(dtype, shape, backend, learns, options.times):.2f}" if possible else "-")
            print(f"| {str(dtype).removeprefix('torch.')} | {list(shape)} | {' | '.join(found)} |", flush=True)


def fastest(dtype: torch.dtype, shape: tuple[int, ...], backend: str, learns: bool, times: int) -> float:
    images, queries, keys, heads, width = shape
    q, k, v = (torch.randn(images, n, heads, width, dtype=dtype, requires_grad=learns) for n in (queries, keys, keys))
    mask = torch.ones(images, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., :5] = False
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        with torch.set_grad_enabled(learns):
            answer = _without_maximum(q, k, v, mask) if backend == "one pass" else attention(q, k, v, mask, backend)
            if learns:
                answer.sum().backward()
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken[1:])


if __name__ == "__main__":
    main()
