"""Share of the machine's convolution peak that the shipped decoder reaches, uncompiled and compiled.

    python benchmarks/decoder_peak.py [--batch 16] [--rounds 5] [--no-compile] [--device cuda]

The peak is measured in the same run, in turn with the decoder: a 3x3 convolution over 256 channels in channels_last, or a
matrix product where that is faster, in the decoder's dtype. Compiling takes a minute or more first.
"""

import argparse
import copy
import statistics

import torch
from turns import machine, now

from unclip import UnCLIPPipeline
from unclip.runtime import attention
from unclip.runtime.compiling import compiled
from unclip.runtime.profiling import flop_counter, measured_peak


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = options.device
    pipe = UnCLIPPipeline.from_pretrained("emoji").to(device)
    pipe._prepare()
    plain, dtype = pipe.decoder, pipe.decoder.dtype
    ways = {"as it is": plain} | ({"compiled": compiled(copy.deepcopy(plain), device)} if options.compile else {})
    x = torch.randn(options.batch, 3, 64, 64, dtype=dtype, device=device)
    context = torch.randn(options.batch, 36, plain.config.cross_attention_dim, dtype=dtype, device=device)
    added = torch.randn(options.batch, plain.config.time_embed_dim, dtype=dtype, device=device)
    timestep = torch.tensor(500, device=device)
    caches = {name: attention.context_kv_cache(network, context) for name, network in ways.items()}

    def run(name: str) -> float:
        more = {"class_labels": added, "cross_attention_kwargs": {"kv_cache": caches[name]}}
        start = now(device)
        ways[name](x, timestep, context, **more)
        return now(device) - start

    with flop_counter() as counter:
        run("as it is")
    flops = counter.get_total_flops()
    print(f"{machine(device)}; {torch.get_num_threads()} threads, {dtype}, batch {options.batch}, {flops / 1e9:.0f} GFLOP")
    for name in ways:
        print(f"first call {name}: {run(name):.1f} s", flush=True)
        run(name)
    rates: dict[str, list[float]] = {name: [] for name in ("peak", *ways)}
    for _ in range(options.rounds):
        rates["peak"].append(measured_peak(device, dtype))
        for name in ways:
            rates[name].append(flops / run(name))
    print("\n| | GFLOP/s | of the peak, least to largest |\n|---|---|---|")
    for name, found in rates.items():
        shares = sorted(a / b for a, b in zip(found, rates["peak"], strict=True))
        share = f"{statistics.median(shares):.0%} ({shares[0]:.0%} to {shares[-1]:.0%})"
        print(f"| {name} | {statistics.median(found) / 1e9:.0f} | {share} |")


if __name__ == "__main__":
    main()
