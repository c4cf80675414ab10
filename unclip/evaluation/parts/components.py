"""The number of connected components of objects, compared with the most similar icons."""

# N images, S pixels of a side

import torch
import torch.nn.functional as F
from torch import Tensor

from ...io.pixels import uint8_to_float
from ..context import EvaluationContext
from ..metrics import mean, object_mask
from ..report import Part, Sheet, Table

MIN_PIXELS = 4  # of a component
SHOWN = 12


def measure(context: EvaluationContext) -> Part:
    """Connected components of the object in sampled images and in the most similar real renders of their names.

    Real: renders at another size and place, beside the renders most similar to them.
    """
    singles = context.single_concepts
    sides = {
        "prior": (singles.from_prior, singles.nearest_to_prior.renders),
        "true embedding": (singles.from_true, singles.nearest_to_true.renders),
        "real": (singles.jittered, singles.nearest_to_jittered.renders),
    }
    counts = {name: (component_counts(images), component_counts(renders)) for name, (images, renders) in sides.items()}
    results = {
        name: {
            "same": mean((ours == theirs).float()),
            "difference": mean((ours - theirs).abs().float()),
            "pieces": mean(ours.float()),
            "pieces_of_icon": mean(theirs.float()),
        }
        for name, (ours, theirs) in counts.items()
    }
    note = (
        f"{len(singles.rows)} names, each beside the most similar real render of the name. A piece: at least {MIN_PIXELS} "
        "pixels whose darkest channel is below 0.97 and that touch, diagonally too."
    )
    columns = ["sampled from", "as many pieces", "mean difference", "pieces", "pieces of the render"]
    table = Table("Connected parts", columns, [[name, *found.values()] for name, found in results.items()], note)
    ours, theirs = counts["prior"]
    worst = (ours - theirs).abs().argsort(descending=True, stable=True)[:SHOWN]
    shown = torch.stack([side[worst] for side in sides["prior"]], 1).flatten(0, 1)
    labels = [
        label
        for n in worst.tolist()
        for label in (f"{singles.prompts[n].text}: {int(ours[n])}", f"nearest icon: {int(theirs[n])}")
    ]
    return Part("parts", results, [table, Sheet("Farthest off", shown, labels)])


def component_counts(images: Tensor) -> Tensor:
    """Connected components (of eight neighbours) of at least `MIN_PIXELS` pixels of each object: int64 [N].

    `images` uint8 [N, 3, S, S], on white. Every pixel takes the largest label of its neighbours, until none changes.
    """
    inside = object_mask(uint8_to_float(images))
    numbers = torch.arange(1, inside[0].numel() + 1, dtype=torch.float32).view_as(inside[0])
    labels = numbers * inside  # [N, S, S], 0 outside
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * inside
        if torch.equal(spread, labels):
            break
        labels = spread
    flat = labels.flatten(1).long()
    counts = torch.zeros(len(images), flat.shape[1] + 1, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    return (counts[:, 1:] >= MIN_PIXELS).sum(1)
