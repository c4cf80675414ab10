"""Detects which two objects an image shows, and where, by comparing its halves with known renders."""

# N images, T concepts, D embedding dimension, P plans

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.judge import Judge
from ..data.judged import distorted_icons, icon_rows
from ..data.scenes import IconSet, Plan

HALVES = ("left", "right", "upper", "lower")
ARRANGEMENTS = {"left": (0, 1), "right": (1, 0), "above": (2, 3), "below": (3, 2)}  # the halves of the first and second object
GROUND = 0.12  # of the range: pixels that differ less from the image's border are background
MARGIN = 0.06  # around the cropped object, as around an icon


class PairDetector:
    """Finds two objects that stand beside or above each other.

    The judge is bad at captions of two objects (it finds both in two of five real renders) but good at single objects. So each
    half is enlarged to an image of its own and compared, in the judge's embeddings, with the renders of every concept in every
    style.
    """

    def __init__(self, judge: Judge, icons: IconSet):
        self.judge = judge
        self.number = {concept: n for n, concept in enumerate(icons.recognisable)}
        self.rows = rows = icon_rows(icons)
        images = distorted_icons(icons, rows, None, seed=0)
        known = torch.stack([centred(image, ground_colour(image)) for image in images])
        self.known = judge.see(known)[0]  # [R, D]
        self.concept = torch.tensor([self.number[icons.icons[row]["concept"]] for row in rows])

    def similarities(self, images: Tensor) -> Tensor:
        """The cosine [N, 4, T] of each half of images uint8 [N, 3, S, S] to each concept's most similar render."""
        windows = torch.stack([window for image in images for window in halves(image)])
        cosines = self.judge.see(windows)[0] @ self.known.T
        best = cosines.new_full((len(cosines), len(self.number)), -1.0)
        return best.scatter_reduce(1, self.concept.expand_as(cosines), cosines, "amax").view(len(images), len(HALVES), -1)

    def scores(self, similarities: Tensor, plans: Sequence[Plan]) -> Tensor:
        """The score [P] of an image's similarities [4, T] for each plan of two objects, in the stated or the best places."""
        first, second = (torch.tensor([self.number[plan.concepts[n]] for plan in plans]) for n in (0, 1))
        each = torch.stack([similarities[a, first] + similarities[b, second] for a, b in ARRANGEMENTS.values()])
        stated = torch.tensor([[plan.relation in (None, name) for plan in plans] for name in ARRANGEMENTS])
        return each.masked_fill(~stated, -torch.inf).amax(0)


def halves(image: Tensor) -> list[Tensor]:
    """The `HALVES` of an image uint8 [3, S, S], each cropped to its content and enlarged to uint8 [3, S, S]."""
    middle, ground = image.shape[-1] // 2, ground_colour(image)
    parts = (image[:, :, :middle], image[:, :, middle:], image[:, :middle], image[:, middle:])
    return [centred(part, ground) for part in parts]


def ground_colour(image: Tensor) -> Tensor:
    """The background colour [3, 1, 1]: the median along the border."""
    edges = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    return edges.float().median(1).values[:, None, None]


def centred(part: Tensor, ground: Tensor) -> Tensor:
    """A part cropped to what differs from the background, centred and resized to the part's longer side."""
    side, part = max(part.shape), part.float()
    held = ((part - ground).abs() > GROUND * 255).any(0)
    rows, columns = (held.any(dim).nonzero()[:, 0] for dim in (1, 0))
    if len(rows):
        part = part[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = part.shape[1:]
    whole = max(2, round(max(height, width) * (1 + 2 * MARGIN)))
    top, left = (whole - height) // 2, (whole - width) // 2
    square = ground.expand(3, whole, whole).clone()
    square[:, top : top + height, left : left + width] = part
    resized = F.interpolate(square[None], (side, side), mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).byte()
