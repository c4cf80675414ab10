"""Recognition by the decoder's guidance scale and number of steps."""

from .. import prompts as prompt_sets
from ..context import EvaluationContext, UnsupportedPart
from ..metrics import Estimate, mean
from ..report import Part, Plot

SWEPT = 64
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = (5, 10, 20, 40)


def measure(context: EvaluationContext) -> Part:
    """Recognition by the decoder's guidance scale and number of steps."""
    if context.settings.get("sampler") == "distilled":
        raise UnsupportedPart("a distilled decoder has neither guidance nor steps to sweep over")
    prompts = context.limited(prompt_sets.recognition(context.icons, context.split), SWEPT)
    wanted, own = context.judge.read([p.text for p in prompts]), context.pipe.sampling_settings(context.settings)
    results, shown = {}, []
    for name, setting, values in (
        ("guidance", "decoder_guidance_scale", GUIDANCE),
        ("steps", "decoder_num_inference_steps", STEPS),
    ):
        lines: dict[str, list[tuple[float, Estimate]]] = {"R@1": [], "R@5": [], "cosine": []}
        for value in values:
            folder = "recognition" if value == own[setting] else f"sweep-{name}-{value:g}"
            images = context.sample(folder, prompts, None, 0, **{setting: value})
            found = (*context.name_recall(images, prompts), (context.judge.see(images)[0] * wanted).sum(1))
            for line, numbers in zip(lines.values(), found, strict=True):
                line.append((value, mean(numbers)))
        results[name] = {line: {f"{x:g}": e for x, e in points} for line, points in lines.items()}
        shown.append(Plot(f"The decoder's {name} ({len(prompts)} names)", name, "R@k, cosine to the name", lines))
    return Part("sweeps", results, shown)
