"""Detects whether an image shows one thing attached to another, by its similarity to renders of that and of alternatives.

The judge was not trained on captions of attachments, so every alternative is rendered: the same combination, with another base
or another thing, with one of the two alone, with the thing elsewhere, with the two swapped, and beside each other. An image is
compared with them in the judge's image embeddings, both cropped to what differs from their background.
"""

# N images, K renders, D embedding dimension

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..clip.judge import Judge
from ..data.anchors import common_name
from ..data.attachments import Attachments, Box
from ..data.plans import Plan
from ..data.render import Layer, compose_sprites
from ..data.scenes import IconSet
from .pair_detector import centred, ground_colour

MAX_ALTERNATIVES = 49  # other bases, and other things
SIDE = 7  # rows and columns of the grid of places that the thing is rendered at
TOLERANCE = 0.06  # of the image's side: how far outside the thing's own extent its centre may lie
SEED = 3
QUESTIONS = ("base", "thing", "place", "relation")


class AttachmentDetector:
    """Answers `QUESTIONS` about images: are the base, the thing, the thing's place and the relation right?"""

    def __init__(self, judge: Judge, icons: IconSet):
        self.judge, self.icons = judge, icons
        self.attachments = Attachments(icons, icons.recognisable)

    def answers(self, images: Sequence[Tensor], plan: Plan) -> tuple[dict[str, list[bool]], dict[str, float]]:
        """For each of `QUESTIONS` whether each of the images, uint8 [3, S, S], answers rightly, and what chance gives.

        An image is compared with renders in the style, of those that have both icons, that it is most similar to.
        """
        seen = torch.cat([self._embed([centred(image, ground_colour(image))]) for image in images])  # of any size each
        plans = [replace(plan, style=style) for style in self._styles(plan)]
        true = torch.stack([self._embed_layers([self._layers(p)]) @ seen.T for p in plans])[:, 0]  # [styles, N]
        found: dict[str, list[bool]] = {about: [False] * len(images) for about in QUESTIONS}
        chance: dict[str, float] = {}
        nearest = true.argmax(0).tolist()
        renders = {style: self._renders(plans[style]) for style in set(nearest)}
        for number, style in enumerate(nearest):
            scores = {about: embeds @ seen[number] for about, embeds in renders[style].items()}
            right = float(true[style, number])
            for about in ("base", "thing", "relation"):
                found[about][number] = bool((scores[about] < right).all())
                chance[about] = 1 / (1 + len(scores[about]))
            found["place"][number] = self._in_place(plans[style], scores["place"])
            chance["place"] = float(np.mean([self._is_near(plans[style], place) for place in PLACES]))
        return found, chance

    # -- alternatives

    def _renders(self, plan: Plan) -> dict[str, Tensor]:
        """The embeddings [K, D] of the renders of each question's alternatives."""
        groups = {
            "base": [self._alone(plan, 1), *map(self._layers, self._others(plan, 0))],
            "thing": [self._alone(plan, 0), *map(self._layers, self._others(plan, 1))],
            "place": [self._moved(plan, place) for place in PLACES],
            "relation": [self._swapped(plan), *self._beside(plan)],
        }
        embeds = self._embed_layers([layers for group in groups.values() for layers in group])
        return dict(zip(groups, embeds.split([len(group) for group in groups.values()]), strict=True))

    def _styles(self, plan: Plan) -> list[str]:
        return [s for s in self.icons.by_concept[plan.concepts[0]] if self.attachments.allows(replace(plan, style=s))]

    def _others(self, plan: Plan, number: int) -> Iterator[Plan]:
        """Plans with another base (0) or another thing (1) of another name, in a random but fixed order."""
        pool = self.attachments.alternatives(plan, number)
        order = np.random.default_rng([SEED, number]).permutation(len(pool))
        names = {common_name(c) for c in plan.concepts}
        kept = 0
        for concept in (pool[n] for n in order):
            if common_name(concept) in names or kept == MAX_ALTERNATIVES:
                continue
            kept += 1
            yield replace(plan, concepts=tuple(concept if n == number else c for n, c in enumerate(plan.concepts)))

    # -- renders

    def _layers(self, plan: Plan) -> list[Layer]:
        rows = self._rows(plan)
        layers, order = self.attachments.lay_out(plan, rows, np.random.default_rng(SEED))
        return [replace(layer, matrix=None) for layer in layers] if order else layers

    def _rows(self, plan: Plan) -> list[int]:
        return [self.icons.by_concept[c][plan.style][0] for c in plan.concepts]

    def _parts(self, plan: Plan) -> tuple[list[Layer], list[Layer], Layer]:
        """The layers of a render, those without the thing, and the thing's."""
        layers, thing = self._layers(plan), self._rows(plan)[1]
        at = next(n for n, layer in enumerate(layers) if layer.icon == thing)
        return layers, layers[:at] + layers[at + 1 :], layers[at]

    def _alone(self, plan: Plan, number: int) -> list[Layer]:
        _, without, thing = self._parts(plan)
        return [thing] if number else without

    def _moved(self, plan: Plan, place: tuple[float, float]) -> list[Layer]:
        layers, _, thing = self._parts(plan)
        box, drawn = self._box(layers), self._box([thing])
        x, y = (box[n] + share * (box[n + 2] - box[n]) for n, share in enumerate(place))
        dx, dy = x - (drawn.left + drawn.right) / 2, y - (drawn.top + drawn.bottom) / 2
        return [replace(la, x=la.x + dx, y=la.y + dy) if la is thing else la for la in layers]

    def _swapped(self, plan: Plan) -> list[Layer]:
        """Base and thing exchanged in place and size, the smaller one in front."""
        _, (base,), thing = self._parts(plan)
        layers = [self._fill(thing.icon, self._box([base])), self._fill(base.icon, self._box([thing]))]
        return sorted(layers, key=lambda layer: -self._box([layer]).size)

    def _beside(self, plan: Plan) -> list[list[Layer]]:
        base, thing = self._rows(plan)
        left, right = Box(0.02, 0.26, 0.50, 0.74), Box(0.50, 0.26, 0.98, 0.74)
        return [[self._fill(a, left), self._fill(b, right)] for a, b in ((base, thing), (thing, base))]

    def _fill(self, row: int, box: Box) -> Layer:
        """A layer whose drawing fills a box's longer side, centred in it."""
        extent = self.attachments.extent(row)
        size = box.size / extent.size
        x = (box.left + box.right) / 2 - ((extent.left + extent.right) / 2 - 0.5) * size
        y = (box.top + box.bottom) / 2 - ((extent.top + extent.bottom) / 2 - 0.5) * size
        return Layer(row, x, y, size)

    def _box(self, layers: Sequence[Layer]) -> Box:
        """The bounding box of several layers' drawings, in fractions of the image."""
        boxes = [self.attachments.drawn_box(layer) for layer in layers]
        return Box(*(f(box[n] for box in boxes) for n, f in enumerate((min, min, max, max))))

    # -- places

    def _in_place(self, plan: Plan, scores: Tensor) -> bool:
        return self._is_near(plan, PLACES[int(scores.argmax())])

    def _is_near(self, plan: Plan, place: tuple[float, float]) -> bool:
        """Whether a place lies within half the thing's extent, plus `TOLERANCE`, of its correct centre."""
        layers, _, thing = self._parts(plan)
        box, drawn = self._box(layers), self._box([thing])
        at = [box[n] + share * (box[n + 2] - box[n]) for n, share in enumerate(place)]
        half = [(drawn[n + 2] - drawn[n]) / 2 + TOLERANCE for n in (0, 1)]
        return all(abs(at[n] - (drawn[n] + drawn[n + 2]) / 2) <= half[n] for n in (0, 1))

    # -- embeddings

    def _embed_layers(self, renders: Sequence[list[Layer]]) -> Tensor:
        images = [torch.from_numpy(compose_sprites(layers, self.icons.sprites, 64)).permute(2, 0, 1) for layers in renders]
        return self._embed([centred(image, ground_colour(image)) for image in images])

    def _embed(self, images: Sequence[Tensor]) -> Tensor:
        return self.judge.see(torch.stack(list(images)))[0]


PLACES = tuple((x, y) for y in np.linspace(0.08, 0.92, SIDE).tolist() for x in np.linspace(0.08, 0.92, SIDE).tolist())
