"""Recognition as the decoder's guidance and number of steps change."""

from .. import prompts as ask
from ..bench import Bench, Impossible
from ..metrics import Estimate, mean
from ..report import Part, Plot

SWEPT = 64
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = (5, 10, 20, 40)


def measure(bench: Bench) -> Part:
    """Recognition as the decoder's guidance and number of steps change."""
    if bench.settings.get("sampler") == "distilled":
        raise Impossible("a distilled decoder has neither guidance nor steps to sweep over")
    prompts = bench.cut(ask.recognition(bench.icons, bench.split), SWEPT)
    wanted, own = bench.judge.read([p.text for p in prompts]), bench.pipe.sampling_settings(bench.settings)
    results, shown = {}, []
    for name, setting, values in (
        ("guidance", "decoder_guidance_scale", GUIDANCE),
        ("steps", "decoder_num_inference_steps", STEPS),
    ):
        lines: dict[str, list[tuple[float, Estimate]]] = {"R@1": [], "R@5": [], "cosine": []}
        for value in values:
            folder = "recognition" if value == own[setting] else f"sweep-{name}-{value:g}"
            pictures = bench.draw(folder, prompts, **{setting: value})
            found = (*bench.named(pictures, prompts), (bench.judge.see(pictures)[0] * wanted).sum(1))
            for line, numbers in zip(lines.values(), found, strict=True):
                line.append((value, mean(numbers)))
        results[name] = {line: {f"{x:g}": e for x, e in points} for line, points in lines.items()}
        shown.append(Plot(f"The decoder's {name} ({len(prompts)} names)", name, "R@k, cosine to the name", lines))
    return Part("sweeps", results, shown)
