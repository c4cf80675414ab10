"""Whether areas are flat and colours few, as in vector icons."""

# N images, S pixels of a side

from collections.abc import Callable

import torch
from torch import Tensor

from ...data.icons import IconSet
from ...data.render import Layer, compose_svg, flatten, render_svg
from ...io.pixels import uint8_to_float
from ..context import EvaluationContext
from ..metrics import colour_count, flat_share, median
from ..poses import POSE
from ..report import Part, Table

LARGE = 64  # names measured above 64 px
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {"flat share": flat_share, "colours": colour_count}


def measure(context: EvaluationContext) -> Part:
    """Medians of the flat share of the object and of the number of colours that cover 90% of it, beside real renders'."""
    singles, sizes = context.single_concepts, context.pipe.sizes
    pairs = {sizes[0]: (singles.from_prior, singles.real)}
    true = {name: median(statistic(uint8_to_float(singles.from_true))) for name, statistic in STATISTICS.items()}
    if len(sizes) > 1:
        count = context.limited_count(LARGE)
        pairs[sizes[1]] = (singles.upsampled(sizes[1], count), rendered_in_pose(context.icons, singles.rows[:count], sizes[1]))
    results: dict[str, dict] = {}
    for size, (sampled, real) in pairs.items():
        found = {}
        for name, statistic in STATISTICS.items():
            sides = {"sampled": sampled, "real": real}
            found[name] = {side: median(statistic(uint8_to_float(images))) for side, images in sides.items()}
        results[f"{size} px"] = found
    rows = [[size, name, *found[name].values()] for size, found in results.items() for name in STATISTICS]
    first = f"{sizes[0]} px"
    for name, estimate in true.items():
        results[first][name]["from true embeddings"] = estimate
        rows.append([f"{first}, from true embeddings", name, estimate, results[first][name]["real"]])
    note = (
        "Medians. Object: pixels whose darkest channel is below 0.97. Flat: the root of the squared forward differences, "
        "summed over channels, is below 0.02. Colours: of 16 levels a channel, the fewest that cover 90% of the object."
    )
    return Part("flatness", results, [Table("Flatness", ["size", "", "sampled", "real renders"], rows, note)])


def rendered_in_pose(icons: IconSet, rows: list[int], size: int) -> Tensor:
    """Icons in their pose, rendered from SVG: uint8 [N, 3, size, size]."""
    drawings = [compose_svg([Layer(row, *POSE)], lambda n: icons.icons[n]["svg"]) for row in rows]
    images = [torch.from_numpy(flatten(render_svg(drawing, size))) for drawing in drawings]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()
