"""Whether the style that a prompt names is right in the prior's embeddings and in the images."""

# N images, D embedding dimension

from typing import Any

import torch
from torch import Tensor

from ...data.icon_packages import STYLES
from ...data.icons import IconSet
from ...data.judged import distorted_icons, icon_rows
from ...data.plans import split_of_concept
from ...io.pixels import uint8_to_float
from ..context import EvaluationContext
from ..metrics import mean, ratio
from ..poses import in_pose
from ..report import Part, Sheet, Table
from ..style_judge import StyleJudge

SHOWN = 24
BATCH = 64


def measure(context: EvaluationContext) -> Part:
    """Names with a style: is the icon nearest to the prior's embedding of it, and the image sampled in it?

    Real: the same for the named icons at another size and place. `judge` is the style judge's accuracy on real renders of
    held-out concepts, on which it was not trained.
    """
    images = context.single_concepts.from_prior_styled
    real = context.single_concepts.jittered
    judge = StyleJudge.load()
    hits = {f"prior: {name}": both for name, both in _of_embeddings(context, real).items()}
    hits |= {f"image: {name}": both for name, both in _of_images(context, judge, images, real).items()}
    results: dict[str, Any] = {
        name: {"sampled": mean(sampled), "real": mean(rendered), "share_of_real": ratio(sampled, rendered)}
        for name, (sampled, rendered) in hits.items()
    }
    rows = [[name, *found.values()] for name, found in results.items()]
    note = (
        f"{len(images)} names that were trained on, each with a style. Prior: the icon nearest to its embedding, among all. "
        "Image: what the style judge reads, and the style of the most similar real render of the name."
    )
    held_out = [r for r in icon_rows(context.icons, seed=4) if split_of_concept(context.icons.icons[r]["concept"]) != "train"]
    if held_out:
        right = judge.read(distorted_icons(context.icons, held_out, None, seed=4)) == styles(context.icons, held_out)
        results["judge"] = mean(right.float())
        rows.append(["the style judge, on held-out concepts", "", results["judge"], ""])
    marks = hits["image: style judge"][0][:SHOWN].bool().tolist()
    sheet = Sheet("The first", images[:SHOWN], [p.text for p in context.single_concepts.styled[:SHOWN]], marks)
    return Part("style", results, [Table("Style", ["right", "sampled", "real", "of real's"], rows, note, True), sheet])


def styles(icons: IconSet, rows: list[int]) -> Tensor:
    """The icons' styles as numbers in `STYLES`: [N]."""
    return torch.tensor([STYLES.index(icons.icons[row]["style"]) for row in rows])


def _of_embeddings(context: EvaluationContext, real: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Whether the icon nearest to the prior's embeddings, and to those of real renders, has the right concept and style."""
    icons, rows = context.icons, icon_rows(context.icons)

    def encoded(images: Tensor) -> Tensor:
        return torch.cat([context.clip.encode_image(uint8_to_float(chunk)).cpu() for chunk in images.split(BATCH)])

    known = encoded(in_pose(icons, rows))
    own = [icons.icons[row] for row in context.single_concepts.rows]
    found = [
        [icons.icons[rows[n]] for n in (embeds @ known.T).argmax(1).tolist()]
        for embeds in (context.prior_embeddings(context.single_concepts.styled), encoded(real))
    ]
    right = {
        key: [torch.tensor([float(a[key] == b[key]) for a, b in zip(some, own, strict=True)]) for some in found]
        for key in ("concept", "style")
    }
    right["concept and style"] = [a * b for a, b in zip(*right.values(), strict=True)]
    return {key: (sampled, rendered) for key, (sampled, rendered) in right.items()}


def _of_images(context: EvaluationContext, judge: StyleJudge, images: Tensor, real: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Whether the style is right in samples and in real renders, by the style judge and by the most similar render."""
    wanted = styles(context.icons, context.single_concepts.rows)
    found: dict[str, list[Tensor]] = {"style judge": [], "most similar render": []}
    for some in (images, real):
        similar = context.single_concepts.nearest(some).rows
        found["style judge"].append(judge.read(some))
        found["most similar render"].append(styles(context.icons, similar.tolist()))
    return {name: ((sampled == wanted).float(), (rendered == wanted).float()) for name, (sampled, rendered) in found.items()}
