"""Attachments: one icon worn, held, ridden or contained by another, placed at anchor points measured on each drawing.

The points of a base icon (unclip/data/attachments.yaml), each with a width: `head`, where a hat's brim lies, as wide as the
head there; `eyes`, between them, as wide as glasses; `face`, its centre and width; `hand`, where things are held; `back`, where
a rider sits; `seat`, where somebody sits; `rim`, below which the lower part of a thing in it is hidden; `inside`, the lower end
of a thing that lies in its opening; `mask`, where another's face goes.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .anchors import common_name, table
from .icons import IconSet
from .layouts import FIT_SHIFT, FIT_SIZES
from .plans import Plan
from .render import GROUNDS, Layer

# The anchors of a base that serve a relation; of two things worn each takes another.
BASES: dict[str, tuple[str, ...]] = {
    "wearing": ("head", "eyes"),
    "holding": ("hand",),
    "riding": ("back",),
    "sitting": ("seat",),
    "inside": ("rim", "inside"),
    "badge": (),
    "face": ("mask",),
}
WEIGHTS = {"wearing": 0.42, "holding": 0.12, "riding": 0.16, "sitting": 0.05, "inside": 0.12, "badge": 0.05, "face": 0.08}
TWO_WORN = 0.2  # share of scenes of the relation "wearing" with two things
GROUNDED = 0.15  # share of all with a background that the caption names
COLOURED = 0.3  # share of worn or held things in a colour that the caption names
FITTING = 0.7  # share of food among things in a dish, and of characters in other containers
HIDDEN = 0.35  # share of the height of a contained thing that is below the rim
BADGE = (0.80, 0.79, 0.36)
GRIP = 0.68  # where a tall thing is held, as a share of its height from the top


class Square(NamedTuple):
    """Where an icon's square lies: its centre and side, in any unit."""

    x: float
    y: float
    size: float


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    @property
    def size(self) -> float:
        return max(self.right - self.left, self.bottom - self.top)


class Attachments:
    """The combinations that an icon set allows, and their layout."""

    def __init__(self, icons: IconSet, concepts: Sequence[str]):
        self.icons, self.concepts = icons, set(concepts)

    @cached_property
    def bases(self) -> dict[str, list[tuple[str, str]]]:
        """Relation -> the (concept, style) pairs with an anchor for it; for a badge, every object."""
        found: dict[str, list[tuple[str, str]]] = {relation: [] for relation in WEIGHTS}
        for concept in sorted(self.concepts & set(table()["bases"])):
            for style in self.icons.by_concept[concept]:
                points = table()["bases"][concept].get(style, {})
                for relation, anchors in BASES.items():
                    if any(anchor in points for anchor in anchors):
                        found[relation].append((concept, style))
        objects = sorted(self.concepts & set(self.icons.objects))
        found["badge"] = [(c, style) for c in objects for style in self.icons.by_concept[c]]
        return found

    def candidate(self, rng: np.random.Generator) -> Plan | None:
        """A random combination, or None if its concepts do not go together."""
        relation = list(WEIGHTS)[int(rng.choice(len(WEIGHTS), p=list(WEIGHTS.values())))]
        if not self.bases[relation]:
            return None
        base, style = self.bases[relation][int(rng.integers(len(self.bases[relation])))]
        concepts, places = [base], set()
        for _ in range(2 if relation == "wearing" and rng.random() < TWO_WORN else 1):
            thing = self._thing(relation, base, style, rng)
            if thing is None or thing in concepts or self._place(thing) in places:
                return None
            concepts.append(thing)
            places.add(self._place(thing))
        colours = ("",) * len(concepts)
        if relation in ("wearing", "holding") and rng.random() < COLOURED:
            colours = ("", *(self._colour(c, style, rng) for c in concepts[1:]))
        ground = list(GROUNDS)[int(rng.integers(len(GROUNDS)))] if rng.random() < GROUNDED else None
        colours = colours if any(colours) else ()
        return Plan("attachment", tuple(concepts), style, relation=relation, background=ground, colours=colours)

    def allows(self, plan: Plan) -> bool:
        """Whether the icons have the plan's concepts in its style, and an anchor for each attached thing."""
        base, *things = plan.concepts
        if any(plan.style not in self.icons.by_concept[c] for c in plan.concepts):
            return False
        if plan.relation == "wearing":
            return all(self._fits(thing, base, plan.style) for thing in things)
        points = table()["bases"].get(base, {}).get(plan.style, {})
        return plan.relation == "badge" or any(anchor in points for anchor in BASES[plan.relation or ""])

    def alternatives(self, plan: Plan, number: int) -> list[str]:
        """The concepts that could take the place of the base (0) or of the thing (1) of a plan of two."""
        if number == 0:
            found = [base for base, style in self.bases[plan.relation or ""] if style == plan.style]
        else:
            lists = {
                "wearing": ["worn"],
                "holding": ["held"],
                "badge": ["badges"],
                "face": ["faces"],
                "inside": ["foods", "riders"],
            }
            found = sorted({c for name in lists.get(plan.relation or "", ["riders"]) for c in table()[name]} & self.concepts)
        plans = ((c, replace(plan, concepts=(c, plan.concepts[1]) if number == 0 else (plan.concepts[0], c))) for c in found)
        return [c for c, other in plans if c not in plan.concepts and self.allows(other)]

    def _thing(self, relation: str, base: str, style: str, rng: np.random.Generator) -> str | None:
        lists = table()
        if relation == "wearing":
            names = list(lists["worn"])
        elif relation == "inside":
            food = rng.random() < FITTING if base in lists["dishes"] else rng.random() >= FITTING
            names = lists["foods" if food else "riders"]
        else:
            names = lists[{"holding": "held", "badge": "badges", "face": "faces"}.get(relation, "riders")]
        thing = names[int(rng.integers(len(names)))]
        if thing not in self.concepts or style not in self.icons.by_concept[thing] or common_name(thing) == common_name(base):
            return None
        return thing if relation != "wearing" or self._fits(thing, base, style) else None

    def _fits(self, thing: str, base: str, style: str) -> bool:
        points, worn = table()["bases"].get(base, {}).get(style, {}), table()["worn"].get(thing, {"place": None})
        wanted = {"eyes": {"eyes"}, "ears": {"head", "face"}}.get(worn["place"], {"head"})
        return style in worn and wanted <= points.keys()

    def _place(self, thing: str) -> str | None:
        """Where a thing is worn, equal for things that cannot be worn together; None for other things."""
        place = table()["worn"].get(thing, {}).get("place")
        return place if place in (None, "eyes") else "head"

    def _colour(self, concept: str, style: str, rng: np.random.Generator) -> str:
        colours = self.icons.icons[self.icons.by_concept[concept][style][0]]["colours"]
        return colours[int(rng.integers(len(colours)))] if colours else ""

    # -- layout

    def lay_out(self, plan: Plan, rows: Sequence[int], rng: np.random.Generator) -> tuple[list[Layer], tuple[int, ...]]:
        """The layers back to front, without colours, and which concept of the plan each shows."""
        points = table()["bases"].get(plan.concepts[0], {}).get(plan.style, {})
        squares, order = [Square(0.5, 0.5, 1.0)], [0]
        for number, (concept, row) in enumerate(zip(plan.concepts[1:], rows[1:], strict=True), 1):
            squares.append(self._attach(plan.relation or "", concept, row, plan.style, points, rng))
            behind = plan.relation == "inside" and "rim" in points
            order.insert(0 if behind else len(order), number)
        squares = self._fit(squares, rows, rng)
        return [Layer(rows[n], *squares[n]) for n in order], tuple(order)

    def _attach(self, relation: str, concept: str, row: int, style: str, points: dict, rng: np.random.Generator) -> Square:
        """The square of an attached thing; the base's own is the unit square."""
        scale, dx, dy = rng.uniform(0.93, 1.07), *rng.uniform(-0.015, 0.015, 2)
        if relation == "wearing":
            place, point = table()["worn"][concept]["place"], table()["worn"][concept][style]
            square = _place_worn(place, point, points)
        else:
            anchor = next((a for a in BASES[relation] if a in points), None)
            x, y, size = points[anchor] if anchor else BADGE
            square = _place_held(self.extent(row), anchor, x, y, size * scale)
        return Square(square.x + dx, square.y + dy, square.size * (scale if relation == "wearing" else 1.0))

    def _fit(self, squares: list[Square], rows: Sequence[int], rng: np.random.Generator) -> list[Square]:
        """The squares, moved and scaled together so that the drawings fill the image up to a margin."""
        drawn = [_drawn_box(square, self.extent(row)) for square, row in zip(squares, rows, strict=True)]
        left, top, right, bottom = (f(box[n] for box in drawn) for n, f in enumerate((min, min, max, max)))
        scale = rng.uniform(*FIT_SIZES) / max(right - left, bottom - top)
        dx, dy = rng.uniform(-FIT_SHIFT, FIT_SHIFT, 2)
        x0, y0 = 0.5 + dx - scale * (left + right) / 2, 0.5 + dy - scale * (top + bottom) / 2
        return [Square(x0 + scale * s.x, y0 + scale * s.y, scale * s.size) for s in squares]

    def drawn_box(self, layer: Layer) -> Box:
        """The bounding box of a layer's opaque pixels, in fractions of the image."""
        return _drawn_box(Square(layer.x, layer.y, layer.size), self.extent(layer.icon))

    def extent(self, row: int) -> Box:
        """The bounding box of an icon's opaque pixels, in fractions of its square."""
        alpha = np.asarray(self.icons.sprites[row][..., 3]) > 40
        side = alpha.shape[0]
        down, across = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        return Box(across[0] / side, down[0] / side, (across[-1] + 1) / side, (down[-1] + 1) / side)


def _place_worn(place: str, point: tuple[float, float, float], points: dict[str, tuple[float, float, float]]) -> Square:
    """The square of a worn thing, so that its own `point` (x, y, width) lies on the anchor for its place."""
    if place == "ears":  # the band over the head, the cups beside the face
        x, y, width = points["face"][0], points["head"][1] - 0.05, 1.1 * points["face"][2]
    elif place == "bow":  # at one side of the head
        x, y, width = points["head"]
        x, y, width = x + 0.34 * width, y - 0.02, 0.7 * width
    else:
        x, y, width = points[place]
    size = width / point[2]
    return Square(x - (point[0] - 0.5) * size, y - (point[1] - 0.5) * size, size)


def _place_held(extent: Box, anchor: str | None, x: float, y: float, size: float) -> Square:
    """The square of a thing whose drawing is `size` long: standing on (x, y), or with its middle or grip there."""
    scale = size / extent.size
    height = (extent.bottom - extent.top) * scale
    if anchor in ("back", "seat", "inside"):
        centre = y - height / 2
    elif anchor == "rim":
        centre = y - (0.5 - HIDDEN) * height
    elif anchor == "hand" and extent.bottom - extent.top > 1.2 * (extent.right - extent.left):
        centre = y + (0.5 - GRIP) * height
    else:
        centre = y
    middle_x, middle_y = (extent.left + extent.right) / 2, (extent.top + extent.bottom) / 2
    return Square(x - (middle_x - 0.5) * scale, centre - (middle_y - 0.5) * scale, scale)


def _drawn_box(square: Square, extent: Box) -> Box:
    left, top = square.x - square.size / 2, square.y - square.size / 2
    return Box(*(start + square.size * v for start, v in zip((left, top, left, top), extent, strict=True)))
