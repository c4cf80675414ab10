"""Which objects a picture of two shows, and where: what its halves hold, beside known renders."""

# N pictures, T concepts, D embedding dimension, P plans

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.judge import Judge
from ..data.judged import distorted_icons, icon_rows
from ..data.scenes import IconSet, Plan

HALVES = ("left", "right", "upper", "lower")
ARRANGEMENTS = {"left": (0, 1), "right": (1, 0), "above": (2, 3), "below": (3, 2)}  # the halves of the first and second object
GROUND = 0.12  # of the range: what differs by less from the picture's border is ground
MARGIN = 0.06  # around what a half holds, as around an icon


class Detector:
    """Finds two objects that stand beside or above each other.

    The judge reads a caption of two objects badly (of real renders it finds both in two of five), but it knows an object that
    it sees alone. So each half's content is enlarged to a picture of its own, and compared in the judge's embeddings with the
    renders of every concept in every style.
    """

    def __init__(self, judge: Judge, icons: IconSet):
        self.judge = judge
        self.number = {concept: n for n, concept in enumerate(icons.recognisable)}
        self.rows = rows = icon_rows(icons)
        images = distorted_icons(icons, rows, None, seed=0)
        known = torch.stack([centred(image, ground_colour(image)) for image in images])
        self.known = judge.see(known)[0]  # [R, D]
        self.concept = torch.tensor([self.number[icons.icons[row]["concept"]] for row in rows])

    def look(self, pictures: Tensor) -> Tensor:
        """How like each concept's most similar render each half is, cosine [N, 4, T], of pictures uint8 [N, 3, S, S]."""
        windows = torch.stack([window for picture in pictures for window in halves(picture)])
        cosines = self.judge.see(windows)[0] @ self.known.T
        best = cosines.new_full((len(cosines), len(self.number)), -1.0)
        return best.scatter_reduce(1, self.concept.expand_as(cosines), cosines, "amax").view(len(pictures), len(HALVES), -1)

    def fit(self, likeness: Tensor, plans: Sequence[Plan]) -> Tensor:
        """How well a picture [4, T] fits each plan of two objects, [P]: in the stated places, else in the best ones."""
        first, second = (torch.tensor([self.number[plan.concepts[n]] for plan in plans]) for n in (0, 1))
        each = torch.stack([likeness[a, first] + likeness[b, second] for a, b in ARRANGEMENTS.values()])
        stated = torch.tensor([[plan.relation in (None, name) for plan in plans] for name in ARRANGEMENTS])
        return each.masked_fill(~stated, -torch.inf).amax(0)


def halves(picture: Tensor) -> list[Tensor]:
    """What the `HALVES` of a picture uint8 [3, S, S] hold, each enlarged on the picture's ground, uint8 [3, S, S]."""
    middle, ground = picture.shape[-1] // 2, ground_colour(picture)
    parts = (picture[:, :, :middle], picture[:, :, middle:], picture[:, :middle], picture[:, middle:])
    return [centred(part, ground) for part in parts]


def ground_colour(picture: Tensor) -> Tensor:
    """The colour [3, 1, 1] along the border."""
    edges = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
    return edges.float().median(1).values[:, None, None]


def centred(part: Tensor, ground: Tensor) -> Tensor:
    """What stands on the ground of a part, in the middle of a picture as large as the part's longer side."""
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
