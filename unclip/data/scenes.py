"""Scenes and their captions, sampled by index.

A scene is sampled by a generator seeded by (seed, split, index), so scene 123 is the same image on any machine, with any
number of processes and after any resume.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from decoder.layout import POSE_SIZE

from .anchors import common_name
from .attachments import Attachments
from .captions import (
    PAIR_WORDS,
    everyday_prompts,
    is_everyday,
    mentions_style,
    plural,
    style_phrase,
    with_article,
    with_tone,
    wordings,
)
from .icons import OBJECT_GROUPS, IconSet
from .layouts import (
    COUNT_SPOTS,
    GROUND_SHIFT,
    GROUND_SIZES,
    LARGE,
    LARGE_SHIFT,
    NAMED_SIZES,
    PAIR_RELATIONS,
    RELATION_SPOTS,
    SHIFT,
    SHRINK,
    SINGLE_SIZES,
)
from .plans import (
    KIND_WEIGHTS,
    NUMBERS,
    OPTIONAL_KINDS,
    RELATIONS,
    SPLITS,
    Plan,
    Scene,
    split_of_concept,
    split_of_icon,
)
from .render import BACKGROUNDS, GROUNDS, WHITE, Layer, apply_matrix, colour_share, recolouring_matrix
from .scene_settings import GROUP_WEIGHTS, SceneSettings, group_weights
from .sentences import DrawingFacts, choose, drawing_facts, informal_caption, sentence_caption, synonym_caption
from .words import Words

__all__ = [
    "GROUP_WEIGHTS",
    "KIND_WEIGHTS",
    "NUMBERS",
    "OBJECT_GROUPS",
    "RELATIONS",
    "SPLITS",
    "IconSet",
    "Plan",
    "Scene",
    "SceneSampler",
    "everyday_prompts",
    "is_everyday",
    "mentions_style",
    "split_of_concept",
    "split_of_icon",
    "style_phrase",
    "wordings",
]

MAX_TRIES = 10_000


class SceneSampler:
    """Samples scene `index` of a split; the same (icons, split, seed, index, settings) always gives the same scene.

    The split "all" holds nothing out. `settings` are those of `SceneSettings`.

    Raises:
        ValueError: for an unknown split, a setting that is none, or `words` of icons without a vocabulary.
    """

    def __init__(self, icons: IconSet, split: str, seed: int = 0, **settings: Any):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.icons, self.split, self.seed, self.settings = icons, split, seed, SceneSettings(**settings)
        if self.settings.words and not icons.words.of:
            raise ValueError("these icons have no other words; build them again with `unclip data emoji`, or set words to 0")
        self.all_concepts, self.single_pose = bool(self.settings.all_concepts), self.settings.single_pose
        self._facts: dict[int, DrawingFacts] = {}
        kinds = self.settings.kind_weights
        self.kinds, self._kind_weights = list(kinds), _normalised(list(kinds.values()))
        # A held-out split may name training concepts in held-out combinations, so all concepts are candidates there.
        every = split != "train" or self.settings.all_concepts
        kept = {c for c in icons.concepts if every or split_of_concept(c) == "train"}
        self._concepts = [c for c in icons.concepts if c in kept]
        self._concept_weights = _normalised([self._concept_weight(c) for c in self._concepts])
        self._objects = [c for c in icons.objects if c in kept]
        self.attachments = Attachments(icons, self._concepts)
        # Where attachments are shown, "a cat with a crown" is a cat that wears it.
        self._pair_words = [words for words in PAIR_WORDS if "attachment" not in kinds or " with " not in words]

    def _concept_weight(self, concept: str) -> float:
        weight = group_weights(self.settings.groups)[self.icons.groups[concept]]
        if self.split != "train" or split_of_concept(concept) == "train":
            return weight
        return weight * float(self.settings.all_concepts or 1)

    def scene(self, index: int) -> Scene:
        return self.lay_out(*self.planned(index))

    def planned(self, index: int) -> tuple[Plan, np.random.Generator]:
        """The plan of scene `index`, and the generator for its layout."""
        rng = self._rng(index)
        if self.settings.contrast and index % 2 and rng.random() < self.settings.contrast:
            changes = self.changes(self.plan(index - 1))
            if changes:
                return choose(rng, changes), rng
            rng = self._rng(index, 1)
        return self._plan(rng), rng

    def plan(self, index: int) -> Plan:
        """The plan of scene `index` without `contrast`."""
        return self._plan(self._rng(index))

    def _rng(self, *index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), *index])

    def _plan(self, rng: np.random.Generator) -> Plan:
        kind = self.kinds[rng.choice(len(self.kinds), p=self._kind_weights)]
        for _ in range(MAX_TRIES):
            plan = self._candidate(kind, rng)
            if plan is not None and self._is_in_split(plan):
                return plan
        raise ValueError(f"these icons allow no scene of the kind {kind!r} in the split {self.split!r}")

    def _is_in_split(self, plan: Plan) -> bool:
        return self.split == "all" or plan.split(self.all_concepts) == self.split

    def _candidate(self, kind: str, rng: np.random.Generator) -> Plan | None:
        """A plan of this kind, or None where the sampled concepts do not go together."""
        if kind == "attachment":
            return self.attachments.candidate(rng)
        if kind in ("single", "colour"):
            concept = self._concepts[rng.choice(len(self._concepts), p=self._concept_weights)]
        else:
            concept = choose(rng, self._objects)
        plan = Plan(kind, (concept,), choose(rng, list(self.icons.by_concept[concept])))
        if kind == "ground":
            return self._on_ground(plan, rng)
        if kind == "three":
            return self._three(plan, rng)
        if kind in ("pair", "relation"):
            return self._pair(plan, rng)
        return self._with_attribute(plan, rng)

    def _with_attribute(self, plan: Plan, rng: np.random.Generator) -> Plan | None:
        """A plan of one concept with the attribute of its kind, if it has one."""
        if plan.kind == "colour":
            colours = self._colours(plan.concepts[0], plan.style)
            return replace(plan, colour=choose(rng, colours)) if colours else None
        if plan.kind == "count":
            return replace(plan, count=int(rng.integers(2, 6)))
        if plan.kind == "background":
            return replace(plan, background=choose(rng, list(BACKGROUNDS)))
        if plan.kind == "size":
            return replace(plan, size=choose(rng, ["small", "large"]))
        return plan

    def _on_ground(self, plan: Plan, rng: np.random.Generator) -> Plan | None:
        colours = self._colours(plan.concepts[0], plan.style)
        colour = choose(rng, colours) if colours and rng.random() < 0.5 else ""
        plan = replace(plan, background=choose(rng, list(GROUNDS)), colours=(colour,) if colour else ())
        return plan if self._stands_out(plan) else None

    def _three(self, plan: Plan, rng: np.random.Generator) -> Plan | None:
        """Three objects of two or three concepts."""
        concept = plan.concepts[0]
        concepts = (concept, *(choose(rng, self._objects) for _ in range(int(rng.integers(1, 3)))))
        apart = len(set(map(common_name, concepts))) == len(concepts)
        twice = len(concepts) == 3 or with_article(common_name(concept)) != common_name(concept)  # no two of a plural
        drawn = all(plan.style in self.icons.by_concept[c] for c in concepts)
        return replace(plan, concepts=concepts) if apart and twice and drawn else None

    def _pair(self, plan: Plan, rng: np.random.Generator) -> Plan | None:
        other = choose(rng, self._objects)
        if other == plan.concepts[0] or plan.style not in self.icons.by_concept[other]:
            return None
        relation = choose(rng, list(RELATIONS)) if plan.kind == "relation" else None
        return replace(plan, concepts=(*plan.concepts, other), relation=relation)

    def _stands_out(self, plan: Plan) -> bool:
        """Whether most of an icon differs in colour from its background."""
        row = self.icons.by_concept[plan.concepts[0]][plan.style][0]
        sprite, matrix = (
            np.asarray(self.icons.sprites[row]),
            self._colour_matrix(row, plan.colours[0] if plan.colours else None),
        )
        rgb = sprite[sprite[..., 3] > 127][:, :3].astype(np.float32) / 255
        rgb = rgb if matrix is None else apply_matrix(rgb, matrix)
        return bool((abs(rgb * 255 - np.array(GROUNDS[plan.background or ""])).max(-1) > 60).mean() > 0.6)

    def changes(self, plan: Plan) -> list[Plan]:
        """The plans of this split that differ in one attribute: another colour, number, place or ground."""
        if plan.kind == "colour":
            options = [replace(plan, colour=c) for c in self._colours(plan.concepts[0], plan.style) if c != plan.colour]
        elif plan.kind == "count":
            options = [replace(plan, count=n) for n in NUMBERS if n != plan.count]
        elif plan.kind == "background":
            options = [replace(plan, background=b) for b in BACKGROUNDS if b != plan.background]
        elif plan.kind == "relation":
            options = [replace(plan, relation=r) for r in RELATIONS if r != plan.relation]
            options.append(replace(plan, concepts=plan.concepts[::-1]))
        else:
            options = []
        return [p for p in options if self._is_in_split(p)]

    def _colours(self, concept: str, style: str) -> list[str]:
        return self.icons.icons[self.icons.by_concept[concept][style][0]]["colours"]

    # -- from a plan to layers and words

    def lay_out(self, plan: Plan, rng: np.random.Generator) -> Scene:
        """A scene of the plan, with place and size jittered by `rng`, and a true caption."""
        if plan.kind in OPTIONAL_KINDS:
            return self._lay_out_optional(plan, rng)
        tone = plan.kind == "single" and rng.random() < self.settings.tones
        rows = [self._row(c, plan.style, rng, tone) for c in plan.concepts] * plan.count
        if plan.count > 1:
            spots = COUNT_SPOTS[plan.count]
        elif plan.relation:
            spots = RELATION_SPOTS[plan.relation]
        elif len(rows) == 2:
            spots = RELATION_SPOTS[choose(rng, PAIR_RELATIONS)]
        else:
            side = rng.uniform(*SINGLE_SIZES)
            side = NAMED_SIZES.get(plan.size or "", POSE_SIZE if self.single_pose else side)
            spots = ((0.5, 0.5, side),)
        matrix = self._colour_matrix(rows[0], plan.colour)
        shrink = rng.uniform(SHRINK, 1.0) if len(rows) > 1 else 1.0
        layers = []
        shift = 0.0 if self.single_pose and len(rows) == 1 else SHIFT
        for row, (x, y, size) in zip(rows, spots, strict=True):
            dx, dy = rng.uniform(-shift, shift, 2) * (1.0 if size < LARGE else LARGE_SHIFT)
            layers.append(Layer(row, x + dx, y + dy, size * shrink, matrix))
        ground = _ground(plan.background, rng)
        tone_name = self.icons.icons[rows[0]]["tone"]
        key = plan.key + (f"|{tone_name}" if tone_name else "")
        caption, names = self._caption(plan, tone_name, layers, rng)
        return Scene(plan.kind, key, plan.style, caption, names, tuple(layers), ground)

    def _lay_out_optional(self, plan: Plan, rng: np.random.Generator) -> Scene:
        """`lay_out` of OPTIONAL_KINDS."""
        rows = [self._row(c, plan.style, rng, False) for c in plan.concepts]
        if plan.kind == "attachment":
            layers, order = self.attachments.lay_out(plan, rows, rng)
        else:
            order = (0, 0, 1) if len(rows) == 2 else tuple(range(len(rows)))
            spots = COUNT_SPOTS[3] if plan.kind == "three" else ((0.5, 0.5, rng.uniform(*GROUND_SIZES)),)
            spots = tuple(spots[n] for n in rng.permutation(3)) if len(rows) == 2 else spots
            shrink, moved = rng.uniform(SHRINK, 1.0), rng.uniform(-SHIFT, SHIFT, (len(spots), 2))
            placed = zip(order, spots, moved, strict=True)
            layers = [Layer(rows[n], x + dx, y + dy, size * shrink) for n, (x, y, size), (dx, dy) in placed]
        if plan.colours:
            matrices = [self._colour_matrix(row, colour) for row, colour in zip(rows, plan.colours, strict=True)]
            layers = [replace(layer, matrix=matrices[n]) for n, layer in zip(order, layers, strict=True)]
        ground = _ground(plan.background, rng)
        names = [common_name(c) if rng.random() < 0.85 else c for c in plan.concepts]
        text = self._in_style(choose(rng, wordings(plan, names)), plan.style, rng)
        if is_everyday(text):
            text, names = wordings(plan)[0], [common_name(c) for c in plan.concepts]
        if len(order) > len(names):
            names[0] = plural(names[0])
        return Scene(plan.kind, plan.key, plan.style, text, tuple(names), tuple(layers), ground, order)

    def _colour_matrix(self, row: int, colour: str | None) -> tuple[float, ...] | None:
        """The colour matrix that gives an icon this colour; None if it has the colour already or none is asked for."""
        sprite = np.asarray(self.icons.sprites[row])
        return recolouring_matrix(sprite, colour) if colour and colour_share(sprite, colour) < 0.75 else None

    def _in_style(self, text: str, style: str, rng: np.random.Generator) -> str:
        if rng.random() < 0.3:
            phrase = style_phrase(style)
            text = choose(rng, [f"{text} in {phrase}", f"{text}, {phrase}", f"{phrase}, {text}"])
        return text

    def _row(self, concept: str, style: str, rng: np.random.Generator, tone: bool) -> int:
        rows = self.icons.by_concept[concept][style]
        return int(rows[rng.integers(1, len(rows))]) if tone and len(rows) > 1 else rows[0]

    def _caption(self, plan: Plan, tone: str, layers: Sequence[Layer], rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
        """The caption, and the name it uses for each concept; of a pair the left object comes first."""
        names = [self._name(c, plan.kind, rng) for c in plan.concepts]
        first = with_tone(names[0], tone)
        if plan.kind == "single":
            tags = self.icons.tags(plan.concepts[0])
            said = self.icons.words.of.get(plan.concepts[0]) if self.settings.words else None
            if self.settings.sentences and rng.random() < self.settings.sentences:
                words = self.icons.words.of.get(plan.concepts[0], Words())
                text = sentence_caption(first, tags, words, self._drawing_facts(layers[0].icon), rng)
            elif said and rng.random() < self.settings.words:
                text = synonym_caption(first, said, tags, self.icons.words, rng)
            elif self.settings.loose and rng.random() < self.settings.loose:
                text = informal_caption(first, tags, rng)
            elif tags and rng.random() < 0.15:
                chosen = rng.permutation(tags)[: int(rng.integers(1, 4))]
                text = f"{first}, {', '.join(chosen)}"
            else:
                text = choose(
                    rng,
                    [
                        first,
                        first,
                        with_article(first),
                        with_article(first),
                        f"an emoji of {with_article(first)}",
                        f"{first} emoji",
                    ],
                )
        elif plan.kind == "pair":
            words = choose(rng, self._pair_words)
            text = words.format(*map(with_article, names if layers[0].x < layers[1].x else names[::-1]))
        else:
            text = choose(rng, wordings(plan, names))
        text = self._in_style(text, plan.style, rng)
        if is_everyday(text):
            text, names = wordings(plan)[0], list(plan.concepts)
        return text, tuple(plural(name) if plan.count > 1 else name for name in names)

    def _drawing_facts(self, row: int) -> DrawingFacts:
        """Colours and parts of an icon's drawing, cached."""
        if row not in self._facts:
            self._facts[row] = drawing_facts(np.asarray(self.icons.sprites[row]))
        return self._facts[row]

    def _name(self, concept: str, kind: str, rng: np.random.Generator) -> str:
        synonyms = self.icons.synonyms[concept]
        if synonyms and rng.random() < (0.2 if kind == "single" else 0.1):
            return choose(rng, synonyms)
        return concept


def _ground(name: str | None, rng: np.random.Generator) -> tuple[int, int, int]:
    """The background colour in RGB: white, or that of the name with jitter."""
    if not name:
        return WHITE
    shifts = (int(rng.integers(-GROUND_SHIFT, GROUND_SHIFT + 1)) for _ in range(3))
    colour = zip((BACKGROUNDS | GROUNDS)[name], shifts, strict=True)
    red, green, blue = (min(max(value + shift, 0), 255) for value, shift in colour)
    return red, green, blue


def _normalised(weights: list[float]) -> np.ndarray:
    return np.asarray(weights) / np.sum(weights)
