"""The layouts of scenes: the places of each kind of scene, and the ranges of their random jitter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from .plans import Plan
from .render import Layer

# Places are (x, y, size): the centre and the side, in fractions of the image's side
COUNT_SPOTS = {
    2: ((0.26, 0.5, 0.46), (0.74, 0.5, 0.46)),
    3: ((0.5, 0.27, 0.44), (0.26, 0.73, 0.44), (0.74, 0.73, 0.44)),
    4: ((0.26, 0.26, 0.44), (0.74, 0.26, 0.44), (0.26, 0.74, 0.44), (0.74, 0.74, 0.44)),
    5: ((0.2, 0.2, 0.34), (0.8, 0.2, 0.34), (0.5, 0.5, 0.34), (0.2, 0.8, 0.34), (0.8, 0.8, 0.34)),
}
# The first spot is the first-named object's.
RELATION_SPOTS = {
    "left": ((0.26, 0.5, 0.48), (0.74, 0.5, 0.48)),
    "right": ((0.74, 0.5, 0.48), (0.26, 0.5, 0.48)),
    "above": ((0.5, 0.26, 0.48), (0.5, 0.74, 0.48)),
    "below": ((0.5, 0.74, 0.48), (0.5, 0.26, 0.48)),
    "on top": ((0.5, 0.30, 0.48), (0.5, 0.67, 0.60)),
}
PAIR_RELATIONS = ("left", "right")  # of two objects whose caption states no places
SINGLE_SIZES = (0.84, 0.98)  # of one object whose caption states no size: from, to; with `single_pose` it is POSE_SIZE
NAMED_SIZES = {"small": 0.42, "large": 1.0}
GROUND_SIZES = (0.7, 0.92)  # of one object on a named background: from, to
SHRINK = 0.9  # several objects have this to 1 of their spot's size, the same factor for all
SHIFT = 0.02  # largest distance of a centre from its spot along each axis
LARGE, LARGE_SHIFT = 0.95, 0.3  # from this size on, this share of SHIFT
FIT_SIZES, FIT_SHIFT = (0.86, 0.96), 0.01  # of attachments: range of the drawing's side; largest shift
GROUND_SHIFT = 10  # largest difference of a background's channel from its colour's, of 255
MAX_LAYERS = max(COUNT_SPOTS)  # objects in a scene
PLACES = 16  # cells a side of the map that says which concept covers what


@dataclass(frozen=True)
class Layout:
    """One way to lay a scene of some kind out.

    Attributes:
        kind: Of the plan.
        spots: Of the layers, back to front.
        concepts: The number of the concept that each layer shows.
        growth: A layer has its spot's size and up to this much more; where all single icons have one pose, those of a kind
            that is `posed` have POSE_SIZE, or a named size as it is.
        shrink: The least random factor of a size.
        relation: Where the first of two objects is; the caption of a pair does not state it.
        size: The size that the caption states.
    """

    kind: str
    spots: tuple[tuple[float, float, float], ...]
    concepts: tuple[int, ...] = (0,)
    growth: float = 0.0
    shrink: float = 1.0
    posed: bool = False
    relation: str | None = None
    size: str | None = None

    @property
    def count(self) -> int:
        """The number of objects that the caption of a kind with one concept states."""
        return 1 if max(self.concepts) else len(self.spots)


def _layouts() -> Iterator[Layout]:
    low, high = SINGLE_SIZES
    for kind in ("single", "colour", "background"):
        yield Layout(kind, ((0.5, 0.5, low),), growth=high - low, posed=True)
    for size, side in NAMED_SIZES.items():
        yield Layout("size", ((0.5, 0.5, side),), posed=True, size=size)
    for count, spots in COUNT_SPOTS.items():
        yield Layout("count", spots, (0,) * count, shrink=SHRINK)
    for relation, spots in RELATION_SPOTS.items():
        yield Layout("relation", spots, (0, 1), shrink=SHRINK, relation=relation)
    for relation in PAIR_RELATIONS:
        yield Layout("pair", RELATION_SPOTS[relation], (0, 1), shrink=SHRINK, relation=relation)
    yield Layout("three", COUNT_SPOTS[3], (0, 1, 2), shrink=SHRINK)
    for spots in permutations(COUNT_SPOTS[3]):  # two of the first concept and one of the other, in any order
        yield Layout("three", spots, (0, 0, 1), shrink=SHRINK)
    low, high = GROUND_SIZES
    yield Layout("ground", ((0.5, 0.5, low),), growth=high - low, shrink=SHRINK)


# A bank of plans holds their numbers: new ones go to the end. Attachments have places of their own.
LAYOUTS = tuple(_layouts())


def layout_of(plan: Plan, layers: Sequence[Layer]) -> int:
    """The number of the layout that gave a plan (no attachment) these `layers`."""

    def fits(layout: Layout) -> bool:
        if (layout.kind, layout.size, len(layout.spots)) != (plan.kind, plan.size, len(layers)):
            return False
        return max(layout.concepts) + 1 == len(plan.concepts) and plan.relation in (None, layout.relation)

    def distance(number: int) -> float:
        places = zip(LAYOUTS[number].spots, layers, strict=True)
        return sum((x - layer.x) ** 2 + (y - layer.y) ** 2 for (x, y, _), layer in places)

    return min((n for n, layout in enumerate(LAYOUTS) if fits(layout)), key=distance)
