"""Samples of common concepts, for comparison of two models by eye (`benchmarks/pairs.py` joins two reports)."""

from ...io.pixels import float_to_uint8, uint8_to_float
from .. import prompts as prompt_sets
from ..context import EvaluationContext, UnsupportedPart
from ..metrics import mean, ratio
from ..report import Part, Sheet, Table


def measure(context: EvaluationContext) -> Part:
    """Recall of 48 common names, at the first upsampler's size if there is one."""
    prompts = context.limited(prompt_sets.common(context.icons))
    if not prompts:
        raise UnsupportedPart("these icons have none of the common concepts")
    sizes, texts = context.pipe.sizes, [prompt.text for prompt in prompts]
    images, folder = context.sample("common", prompts), "common"
    if len(sizes) > 1:
        folder = f"upsampled-common-{sizes[0]}-{sizes[1]}"
        images = float_to_uint8(context.upsample(folder, texts, uint8_to_float(images), sizes[1]))
    sampled, real = (context.name_recall(some, prompts) for some in (images, context.real_renders(prompts)))
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
