"""Scenes and their captions: what an image shows, where, in which colour, and how a person would say it.

A scene is drawn from a generator seeded by (seed, split, index), so scene 123 is the same image on any machine, any
number of processes and after any resume.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .anchors import called
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
    POSE_SIZE,
    RELATION_SPOTS,
    SHIFT,
    SHRINK,
    SINGLE_SIZES,
)
from .plans import (
    KIND_WEIGHTS,
    MORE_KINDS,
    NUMBERS,
    RELATIONS,
    SPLITS,
    Plan,
    Scene,
    split_of_concept,
    split_of_icon,
)
from .render import BACKGROUNDS, GROUNDS, WHITE, Layer, apply_matrix, colour_share, turn_to
from .sentences import Drawn, drawn, in_other_words, loosely, pick, sentence
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

# How often a concept of each group is drawn, relative to an animal: symbols and flags are many and little asked for.
GROUP_WEIGHTS = {
    "smileys-emotion": 1.0,
    "people-body": 0.4,
    "animals-nature": 1.0,
    "food-drink": 1.0,
    "travel-places": 0.8,
    "activities": 1.0,
    "objects": 0.9,
    "symbols": 0.25,
    "flags": 0.1,
}
TONE_SHARE = 0.2
MAX_TRIES = 10_000


class SceneSampler:
    """Draws scene `index` of a split; the same (icons, split, seed, index) always gives the same scene.

    The split "all" knows no held-out combination. `kinds` restricts the kinds of scene, and says how often each comes
    where it is a mapping; `groups` replaces entries of GROUP_WEIGHTS; `tones` is the share of single
    icons with a skin tone, where they have one. `contrast` is the share of odd indices that repeat the scene before with one
    attribute changed (another colour, number, place or ground): hard negatives for contrastive training. With `all_concepts`
    no concept is held out whole: of a tenth of them one style is. A number is how often these come in training as single icons,
    beside the others (True: as often), for networks that learned of them late. `loose` is the share of single icons that are
    named as people do: by tags alone ("amphibian, green"), or with words around them that change nothing ("please draw a
    nice frog"). `words` is the share of those that have any which are named by other words for them (unclip/data/words.py):
    synonyms, narrower kinds, and what a dictionary says that they are. `sentences` is the share of single icons told of in a
    sentence of tags, definitions, and facts of the drawing (unclip/data/sentences.py), drawn before the other two. With
    `single_pose` a single icon whose caption names no size always has the same size and place (POSE_SIZE, centred); scenes of
    several keep theirs.
    """

    def __init__(
        self,
        icons: IconSet,
        split: str,
        seed: int = 0,
        kinds: Sequence[str] | Mapping[str, float] | None = None,
        contrast: float = 0.0,
        tones: float = TONE_SHARE,
        groups: dict[str, float] | None = None,
        all_concepts: bool | float = False,
        loose: float = 0.0,
        words: float = 0.0,
        single_pose: bool = False,
        sentences: float = 0.0,
    ):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        known = KIND_WEIGHTS | MORE_KINDS
        unknown = set(kinds or ()) - set(known)
        if unknown:
            raise ValueError(f"unknown kinds of scene {sorted(unknown)}; choose from {list(known)}")
        unknown = set(groups or {}) - set(GROUP_WEIGHTS)
        if unknown:
            raise ValueError(f"unknown groups of concepts {sorted(unknown)}; choose from {list(GROUP_WEIGHTS)}")
        of_groups = GROUP_WEIGHTS | (groups or {})
        of_kinds = dict(kinds) if isinstance(kinds, Mapping) else {k: known[k] for k in kinds or KIND_WEIGHTS}
        for name, weights, given in (("groups", of_groups, groups), ("kinds", of_kinds, kinds)):
            wrong = [w for w in weights.values() if not isinstance(w, int | float) or not 0 <= w < float("inf")]
            if wrong or not sum(weights.values()):
                raise ValueError(f"weights of {name} must be numbers of at least 0, not all of them 0, got {given!r}")
        self.icons, self.split, self.seed, self.contrast, self.tones = icons, split, seed, contrast, tones
        for name, share in (("loose", loose), ("words", words), ("sentences", sentences)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if words and not icons.words.of:
            raise ValueError("these icons have no other words; build them again with `unclip data emoji`, or set words to 0")
        if not isinstance(all_concepts, int | float) or not 0 <= all_concepts < float("inf"):
            raise ValueError(f"all_concepts must be true, false or a number of at least 0, got {all_concepts!r}")
        self.all_concepts, self.loose, self.words, self.single_pose = bool(all_concepts), loose, words, single_pose
        self.sentences: float = sentences
        self._facts: dict[int, Drawn] = {}
        self.kinds, self._kind_weights = list(of_kinds), _normalised(list(of_kinds.values()))
        # A held-out split may name training concepts in held-out combinations, so all concepts are candidates there.
        every = split != "train" or all_concepts
        kept = {c for c in icons.concepts if every or split_of_concept(c) == "train"}
        self._concepts = [c for c in icons.concepts if c in kept]
        late = float(all_concepts or 1) if split == "train" else 1.0
        self._concept_weights = _normalised(
            [of_groups[icons.groups[c]] * (1 if split_of_concept(c) == "train" else late) for c in self._concepts]
        )
        self._objects = [c for c in icons.objects if c in kept]
        self.attachments = Attachments(icons, self._concepts)
        # A cat with a crown wears it, where attachments are shown.
        self._pair_words = [words for words in PAIR_WORDS if "attachment" not in of_kinds or " with " not in words]

    def scene(self, index: int) -> Scene:
        return self.lay_out(*self.planned(index))

    def planned(self, index: int) -> tuple[Plan, np.random.Generator]:
        """What scene `index` shows, and the generator that lays it out."""
        rng = self._rng(index)
        if self.contrast and index % 2 and rng.random() < self.contrast:
            changes = self.changes(self.plan(index - 1))
            if changes:
                return pick(rng, changes), rng
            rng = self._rng(index, 1)
        return self._plan(rng), rng

    def plan(self, index: int) -> Plan:
        """What scene `index` shows, where no neighbour is contrasted."""
        return self._plan(self._rng(index))

    def _rng(self, *index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), *index])

    def _plan(self, rng: np.random.Generator) -> Plan:
        kind = self.kinds[rng.choice(len(self.kinds), p=self._kind_weights)]
        for _ in range(MAX_TRIES):
            plan = self._candidate(kind, rng)
            if plan is not None and self._belongs(plan):
                return plan
        raise ValueError(f"these icons allow no scene of the kind {kind!r} in the split {self.split!r}")

    def _belongs(self, plan: Plan) -> bool:
        return self.split == "all" or plan.split(self.all_concepts) == self.split

    def _candidate(self, kind: str, rng: np.random.Generator) -> Plan | None:
        if kind == "single":
            concept = self._concepts[rng.choice(len(self._concepts), p=self._concept_weights)]
            return Plan(kind, (concept,), pick(rng, list(self.icons.by_concept[concept])))
        if kind == "attachment":
            return self.attachments.candidate(rng)
        if kind == "colour":
            concept = self._concepts[rng.choice(len(self._concepts), p=self._concept_weights)]
        else:
            concept = pick(rng, self._objects)
        style = pick(rng, list(self.icons.by_concept[concept]))
        plan = Plan(kind, (concept,), style)
        if kind == "colour":
            colours = self._colours(concept, style)
            return replace(plan, colour=pick(rng, colours)) if colours else None
        if kind == "count":
            return replace(plan, count=int(rng.integers(2, 6)))
        if kind == "background":
            return replace(plan, background=pick(rng, list(BACKGROUNDS)))
        if kind == "size":
            return replace(plan, size=pick(rng, ["small", "large"]))
        if kind == "ground":
            colours = self._colours(concept, style)
            colour = pick(rng, colours) if colours and rng.random() < 0.5 else ""
            plan = replace(plan, background=pick(rng, list(GROUNDS)), colours=(colour,) if colour else ())
            return plan if self._stands_out(plan) else None
        if kind == "three":
            concepts = (concept, *(pick(rng, self._objects) for _ in range(int(rng.integers(1, 3)))))
            apart = len(set(map(called, concepts))) == len(concepts)
            twice = len(concepts) == 3 or with_article(called(concept)) != called(concept)  # no two of a plural
            drawn = all(style in self.icons.by_concept[c] for c in concepts)
            return replace(plan, concepts=concepts) if apart and twice and drawn else None
        other = pick(rng, self._objects)
        if other == concept or style not in self.icons.by_concept[other]:
            return None
        relation = pick(rng, list(RELATIONS)) if kind == "relation" else None
        return replace(plan, concepts=(concept, other), relation=relation)

    def _stands_out(self, plan: Plan) -> bool:
        """Whether most of an icon differs in colour from the ground it is to stand on."""
        row = self.icons.by_concept[plan.concepts[0]][plan.style][0]
        sprite, matrix = np.asarray(self.icons.sprites[row]), self._turned(row, plan.colours[0] if plan.colours else None)
        rgb = sprite[sprite[..., 3] > 127][:, :3].astype(np.float32) / 255
        rgb = rgb if matrix is None else apply_matrix(rgb, matrix)
        return bool((abs(rgb * 255 - GROUNDS[plan.background]).max(-1) > 60).mean() > 0.6)

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
        return [p for p in options if self._belongs(p)]

    def _colours(self, concept: str, style: str) -> list[str]:
        return self.icons.icons[self.icons.by_concept[concept][style][0]]["colours"]

    # -- from a plan to layers and words

    def lay_out(self, plan: Plan, rng: np.random.Generator) -> Scene:
        """A picture of the plan, with its small accidents of place and size drawn from `rng`, and a true caption."""
        if plan.kind in MORE_KINDS:
            return self._lay_out_more(plan, rng)
        tone = plan.kind == "single" and rng.random() < self.tones
        rows = [self._row(c, plan.style, rng, tone) for c in plan.concepts] * plan.count
        if plan.count > 1:
            spots = COUNT_SPOTS[plan.count]
        elif plan.relation:
            spots = RELATION_SPOTS[plan.relation]
        elif len(rows) == 2:
            spots = RELATION_SPOTS[pick(rng, PAIR_RELATIONS)]
        else:
            side = rng.uniform(*SINGLE_SIZES)
            side = NAMED_SIZES.get(plan.size, POSE_SIZE if self.single_pose else side)
            spots = ((0.5, 0.5, side),)
        matrix = self._turned(rows[0], plan.colour)
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

    def _lay_out_more(self, plan: Plan, rng: np.random.Generator) -> Scene:
        """`lay_out` of MORE_KINDS."""
        rows = [self._row(c, plan.style, rng, False) for c in plan.concepts]
        if plan.kind == "attachment":
            layers, order = self.attachments.lay_out(plan, rows, rng)
        else:
            order = (0, 0, 1) if len(rows) == 2 else tuple(range(len(rows)))
            spots = COUNT_SPOTS[3] if plan.kind == "three" else ((0.5, 0.5, rng.uniform(*GROUND_SIZES)),)
            spots = [spots[n] for n in rng.permutation(3)] if len(rows) == 2 else spots
            shrink, moved = rng.uniform(SHRINK, 1.0), rng.uniform(-SHIFT, SHIFT, (len(spots), 2))
            placed = zip(order, spots, moved, strict=True)
            layers = [Layer(rows[n], x + dx, y + dy, size * shrink) for n, (x, y, size), (dx, dy) in placed]
        if plan.colours:
            turned = [self._turned(row, colour) for row, colour in zip(rows, plan.colours, strict=True)]
            layers = [replace(layer, matrix=turned[n]) for n, layer in zip(order, layers, strict=True)]
        ground = _ground(plan.background, rng)
        names = [called(c) if rng.random() < 0.85 else c for c in plan.concepts]
        text = self._in_style(pick(rng, wordings(plan, names)), plan.style, rng)
        if is_everyday(text):
            text, names = wordings(plan)[0], [called(c) for c in plan.concepts]
        if len(order) > len(names):
            names[0] = plural(names[0])
        return Scene(plan.kind, plan.key, plan.style, text, tuple(names), tuple(layers), ground, order)

    def _turned(self, row: int, colour: str | None) -> tuple[float, ...] | None:
        """The colour matrix that gives an icon this colour; None where it has it, or none is asked."""
        sprite = np.asarray(self.icons.sprites[row])
        return turn_to(sprite, colour) if colour and colour_share(sprite, colour) < 0.75 else None

    def _in_style(self, text: str, style: str, rng: np.random.Generator) -> str:
        if rng.random() < 0.3:
            phrase = style_phrase(style)
            text = pick(rng, [f"{text} in {phrase}", f"{text}, {phrase}", f"{phrase}, {text}"])
        return text

    def _row(self, concept: str, style: str, rng: np.random.Generator, tone: bool) -> int:
        rows = self.icons.by_concept[concept][style]
        return int(rows[rng.integers(1, len(rows))]) if tone and len(rows) > 1 else rows[0]

    def _caption(self, plan: Plan, tone: str, layers: Sequence[Layer], rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
        """The caption, and its name for each concept of the plan; of two things without a place the left one comes first."""
        names = [self._name(c, plan.kind, rng) for c in plan.concepts]
        first = with_tone(names[0], tone)
        if plan.kind == "single":
            tags = self.icons.tags(plan.concepts[0])
            said = self.icons.words.of.get(plan.concepts[0]) if self.words else None
            if self.sentences and rng.random() < self.sentences:
                words = self.icons.words.of.get(plan.concepts[0], Words())
                text = sentence(first, tags, words, self._drawn(layers[0].icon), rng)
            elif said and rng.random() < self.words:
                text = in_other_words(first, said, tags, self.icons.words, rng)
            elif self.loose and rng.random() < self.loose:
                text = loosely(first, tags, rng)
            elif tags and rng.random() < 0.15:
                chosen = rng.permutation(tags)[: int(rng.integers(1, 4))]
                text = f"{first}, {', '.join(chosen)}"
            else:
                text = pick(
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
            words = pick(rng, self._pair_words)
            text = words.format(*map(with_article, names if layers[0].x < layers[1].x else names[::-1]))
        else:
            text = pick(rng, wordings(plan, names))
        text = self._in_style(text, plan.style, rng)
        if is_everyday(text):
            text, names = wordings(plan)[0], list(plan.concepts)
        return text, tuple(plural(name) if plan.count > 1 else name for name in names)

    def _drawn(self, row: int) -> Drawn:
        """Facts of an icon's drawing, found once."""
        if row not in self._facts:
            self._facts[row] = drawn(np.asarray(self.icons.sprites[row]))
        return self._facts[row]

    def _name(self, concept: str, kind: str, rng: np.random.Generator) -> str:
        synonyms = self.icons.synonyms[concept]
        if synonyms and rng.random() < (0.2 if kind == "single" else 0.1):
            return pick(rng, synonyms)
        return concept


def _ground(name: str | None, rng: np.random.Generator) -> tuple[int, int, int]:
    """The colour behind the objects: white, or about that of the name."""
    if not name:
        return WHITE
    shifts = (int(rng.integers(-GROUND_SHIFT, GROUND_SHIFT + 1)) for _ in range(3))
    return tuple(min(max(v + shift, 0), 255) for v, shift in zip((BACKGROUNDS | GROUNDS)[name], shifts, strict=True))


def _normalised(weights: list[float]) -> np.ndarray:
    return np.asarray(weights) / np.sum(weights)
