"""Plans (the meaning of a scene) and scenes (a plan that is laid out), and the split that each belongs to.

What is held out is decided by hashes of names, never by a random state.
"""

import hashlib
from dataclasses import dataclass
from itertools import combinations

from .icon_packages import STYLES
from .render import WHITE, Layer

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = ("left", "right", "above", "below", "on top")
KIND_WEIGHTS = {
    "single": 0.50,
    "colour": 0.12,
    "count": 0.09,
    "relation": 0.12,
    "pair": 0.05,
    "background": 0.09,
    "size": 0.03,
}
# Kinds that are used only if a configuration names them, with their default weights.
OPTIONAL_KINDS = {"attachment": 0.15, "three": 0.05, "ground": 0.08}
SPLITS = ("train", "validation", "test", "all")


def _fraction(*words: str) -> float:
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split(share: float, *words: str) -> str:
    """ "validation" for the first half of the held-out `share`, "test" for the second, "train" for the rest."""
    at = _fraction(*words)
    return "validation" if at < share / 2 else "test" if at < share else "train"


def split_of_concept(concept: str) -> str:
    return _split(0.10, "concept", concept)


def split_of_icon(concept: str, style: str, all_concepts: bool = False) -> str:
    """The split of an icon: of a held-out concept every style is held out, or with `all_concepts` one of the four."""
    split = split_of_concept(concept)
    if split == "train":
        return _split(0.05, "style", style, concept)
    if all_concepts and style != STYLES[int(_fraction("unseen style", concept) * len(STYLES))]:
        return "train"
    return split


@dataclass(frozen=True)
class Plan:
    """The meaning of a scene, which its caption states, before layout."""

    kind: str
    concepts: tuple[str, ...]
    style: str
    colour: str | None = None
    count: int = 1
    relation: str | None = None
    background: str | None = None
    size: str | None = None
    colours: tuple[str, ...] = ()  # of each concept where `colour` is not enough, "" for its own

    @property
    def key(self) -> str:
        """Equal for two plans exactly when one caption (without a style word) is true of both."""
        alike = self.kind == "pair" or (self.kind == "three" and len(self.concepts) == 3)
        concepts = [self.kind] * (self.kind in OPTIONAL_KINDS) + (sorted(self.concepts) if alike else [*self.concepts])
        facts = (self.colour, self.count, self.relation, self.background, self.size, *self.colours)
        return "|".join([*concepts, *(str(f) for f in facts)])

    def split(self, all_concepts: bool = False) -> str:
        """The split of the plan: train only if no concept and no combination in it is held out."""
        splits = [split_of_icon(c, self.style, all_concepts) for c in self.concepts]
        first = self.concepts[0]
        if self.colour:
            splits.append(_split(0.15, "colour", self.colour, first))
        splits += [_split(0.15, "colour", colour, c) for c, colour in zip(self.concepts, self.colours, strict=False) if colour]
        if self.kind == "attachment":
            base, *things = (c.removesuffix(" face") for c in self.concepts)  # people call both "dog face" and "dog" a dog
            splits += [_split(0.20, "attachment", str(self.relation), base, thing) for thing in things]
        elif len(self.concepts) > 1:
            splits += [_split(0.20, "pair", *pair) for pair in combinations(sorted(set(self.concepts)), 2)]
        if self.count > 1:
            splits.append(_split(0.15, "count", str(self.count), first))
        if self.background:
            splits.append(_split(0.15, "background", self.background, first))
        held_out = [s for s in splits if s != "train"]
        return "train" if not held_out else "test" if "test" in held_out else "validation"


@dataclass(frozen=True)
class Scene:
    """A laid-out image: back-to-front `layers` over an RGB `background`, with one true `caption`.

    `names` are the caption's words for each concept of the plan; layer n shows concept `order[n]`, or without `order` concept n
    modulo their number.
    """

    kind: str
    key: str
    style: str
    caption: str
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    background: tuple[int, int, int] = WHITE
    order: tuple[int, ...] = ()
