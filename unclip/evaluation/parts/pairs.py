"""Common concepts to look at, an earlier model's beside a later one's (`benchmarks/pairs.py` puts two reports together)."""

from .. import prompts as ask
from ..bench import Bench, Impossible
from ..metrics import mean, ratio
from ..report import Part, Sheet, Table


def measure(bench: Bench) -> Part:
    """48 names that people ask for first, at the first upsampler's size where there is one; does the judge find the name?"""
    prompts = bench.cut(ask.common(bench.icons))
    if not prompts:
        raise Impossible("these icons have none of the common concepts")
    sizes, texts = bench.pipe.sizes, [prompt.text for prompt in prompts]
    images, folder = bench.draw("common", prompts), "common"
    if len(sizes) > 1:
        folder = f"upsampled-common-{sizes[0]}-{sizes[1]}"
        images = (bench.enlarged(folder, texts, images.float() / 255, sizes[1]) * 255).round().byte()
    sampled, real = (bench.named(some, prompts) for some in (images, bench.truths(prompts)))
    results = {
        "r1": mean(sampled[0]),
        "real_r1": mean(real[0]),
        "share_of_real": ratio(sampled[0], real[0]),
        "prompts": texts,
        "pictures": [f"{folder}/{n:05d}.png" for n in range(len(texts))],
    }
    table = Table("Common concepts", ["R@1", "real R@1", "of real's"], [list(results.values())[:3]], "", True)
    sheet = Sheet(f"{len(texts)} common concepts", images, texts, sampled[0].bool().tolist(), side=128)
    return Part("pairs", results, [table, sheet])
