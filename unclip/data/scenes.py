"""Scenes and their captions: what a picture shows, where, in which colour, and how a person would say it.

A scene is drawn from a generator seeded by (seed, split, index), so scene 123 is the same picture on any machine, any
number of processes and after any resume. What is held out is decided by hashes of names, never by a random state.
"""

import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
import typeguard
import yaml
from torch import Tensor

from .emoji import STYLES
from .render import BACKGROUNDS, COLOURS, WHITE, Layer, colour_share, compose_sprites, compose_svg, turn_to
from .words import Vocabulary, Words, load_words

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = ("left", "right", "above", "below", "on top")
OBJECT_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
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
KIND_WEIGHTS = {
    "single": 0.50,
    "colour": 0.12,
    "count": 0.09,
    "relation": 0.12,
    "pair": 0.05,
    "background": 0.09,
    "size": 0.03,
}
TONE_SHARE = 0.2
MAX_TRIES = 10_000
SPLITS = ("train", "validation", "test", "all")
_LETTERS = re.compile(r"\bbutton\b|^keycap|^input |^(circled m|copyright|registered|trade mark|atm sign|information)$")
_STYLE_WORDS = re.compile(r"\b(in )?(noto|flat|3d|twemoji) style\b")


def _inflect():
    """inflect, without the checks of its arguments that typeguard would write into every function of it, for seconds."""
    checked, typeguard.typechecked = typeguard.typechecked, lambda function: function
    try:
        import inflect
    finally:
        typeguard.typechecked = checked
    return inflect.engine()


_INFLECT = _inflect()


# ---------------------------------------------------------------------------------------------- held out


def _fraction(*words: str) -> float:
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def everyday_prompts() -> dict[str, tuple[str, ...]]:
    """The everyday prompts of the evaluation with the concepts that answer each; no training caption says one of them."""
    table = yaml.safe_load((Path(__file__).parent / "everyday.yaml").read_text())
    return {prompt: tuple(concepts) for prompt, concepts in table.items()}


@cache
def _everyday_words() -> frozenset[str]:
    return frozenset(map(_bare, everyday_prompts()))


def is_everyday(caption: str) -> bool:
    """Whether a caption says the same as an everyday prompt, up to case, articles, "emoji" and a style."""
    return _bare(caption) in _everyday_words()


def _bare(caption: str) -> str:
    text = " ".join(_STYLE_WORDS.sub(" ", caption.lower()).replace(",", " ").replace("-", " ").split())
    text = text.removeprefix("an emoji of ").removesuffix(" emoji")
    return text.removeprefix("a ").removeprefix("an ").removeprefix("the ")


def _split(share: float, *words: str) -> str:
    """ "validation" for the first half of the held-out `share`, "test" for the second, "train" for the rest."""
    at = _fraction(*words)
    return "validation" if at < share / 2 else "test" if at < share else "train"


def split_of_concept(concept: str) -> str:
    return _split(0.10, "concept", concept)


def split_of_icon(concept: str, style: str, all_concepts: bool = False) -> str:
    """Of a concept that is held out every style is, or one of the four where `all_concepts` are trained on."""
    split = split_of_concept(concept)
    if split == "train":
        return _split(0.05, "style", style, concept)
    if all_concepts and style != STYLES[int(_fraction("unseen style", concept) * len(STYLES))]:
        return "train"
    return split


@dataclass(frozen=True)
class Plan:
    """What a scene shows, before it is laid out: the meaning that its caption states."""

    kind: str
    concepts: tuple[str, ...]
    style: str
    colour: str | None = None
    count: int = 1
    relation: str | None = None
    background: str | None = None
    size: str | None = None

    @property
    def key(self) -> str:
        """Equal for two plans exactly when one caption (without a style word) is true of both."""
        concepts = sorted(self.concepts) if self.kind == "pair" else self.concepts
        facts = (self.colour, self.count, self.relation, self.background, self.size)
        return "|".join([*concepts, *(str(f) for f in facts)])

    def split(self, all_concepts: bool = False) -> str:
        """Where the plan belongs: a plan is in train only if no part and no combination in it is held out."""
        combinations = [split_of_icon(c, self.style, all_concepts) for c in self.concepts]
        first = self.concepts[0]
        if self.colour:
            combinations.append(_split(0.15, "colour", self.colour, first))
        if len(self.concepts) == 2:
            combinations.append(_split(0.20, "pair", *sorted(self.concepts)))
        if self.count > 1:
            combinations.append(_split(0.15, "count", str(self.count), first))
        if self.background:
            combinations.append(_split(0.15, "background", self.background, first))
        held_out = [s for s in combinations if s != "train"]
        return "train" if not held_out else "test" if "test" in held_out else "validation"


@dataclass(frozen=True)
class Scene:
    """A laid-out picture: back-to-front `layers` over an RGB `background`, with one true `caption`.

    `names` are the caption's words for each concept of the plan; layer n shows concept n modulo their number.
    """

    kind: str
    key: str
    style: str
    caption: str
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    background: tuple[int, int, int] = WHITE


# ---------------------------------------------------------------------------------------------- icons


@dataclass
class IconSet:
    """The icons that scenes are made of, as `unclip data emoji` leaves them in a folder."""

    icons: list[dict]
    sprites: np.ndarray = field(repr=False)  # [N, 64, 64, 4] uint8 RGBA, memory-mapped
    words_file: Path | None = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> "IconSet":
        """The icons of a built dataset, or the plain shapes when `folder` is "shapes".

        Raises FileNotFoundError, with what to run, when the folder holds no built dataset.
        """
        if str(folder) == "shapes":
            from .shapes import shape_icons

            return cls(*shape_icons())
        folder = Path(folder)
        if not (folder / "icons.json.gz").exists():
            raise FileNotFoundError(f"no emoji dataset in {folder}; build it with `unclip data emoji --out {folder}`")
        icons = json.loads(gzip.decompress((folder / "icons.json.gz").read_bytes()))
        return cls(icons, np.load(folder / "sprites-64.npy", mmap_mode="r"), folder / "words.json.gz")

    def __len__(self) -> int:
        return len(self.icons)

    @cached_property
    def words(self) -> Vocabulary:
        """What people call the concepts: read where captions are to use it alone."""
        return _load_words(self.words_file) if self.words_file else Vocabulary()

    @cached_property
    def by_concept(self) -> dict[str, dict[str, list[int]]]:
        """Concept -> style -> rows; the drawing without a skin tone comes first."""
        table: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for n, icon in enumerate(self.icons):
            table[icon["concept"]][icon["style"]].append(n)
        for styles in table.values():
            for rows in styles.values():
                rows.sort(key=lambda n: self.icons[n]["tone"] != "")
        return {concept: dict(styles) for concept, styles in table.items()}

    def on_white(self, rows: Sequence[int]) -> Tensor:
        """The drawings of these rows: [N, 3, 64, 64] in [0, 1]."""
        sprites = torch.from_numpy(self.sprites[list(rows)]).permute(0, 3, 1, 2).float() / 255
        return sprites[:, :3] * sprites[:, 3:] + 1 - sprites[:, 3:]

    @cached_property
    def concepts(self) -> list[str]:
        return sorted(self.by_concept)

    @cached_property
    def groups(self) -> dict[str, str]:
        return {icon["concept"]: icon["group"] for icon in self.icons}

    @cached_property
    def objects(self) -> list[str]:
        """Concepts that can stand in a scene: things and animals with a short, countable name."""
        return [c for c in self.concepts if self.groups[c] in OBJECT_GROUPS and _countable(c)]

    @cached_property
    def recognisable(self) -> list[str]:
        """Concepts that a picture can be told by: no flags, and nothing that is mostly letters or digits."""
        return [c for c in self.concepts if self.groups[c] != "flags" and not _LETTERS.search(c)]

    @cached_property
    def synonyms(self) -> dict[str, list[str]]:
        """Concept -> tags that at most three concepts share: a feline is a cat, but "face" is a hundred things.

        Words that are everyday prompts of the evaluation are left out.
        """
        tags = {icon["concept"]: icon["tags"] for icon in self.icons}
        shared: dict[str, int] = defaultdict(int)
        for words in tags.values():
            for word in words:
                shared[word] += 1
        kept = {w for w, count in shared.items() if count <= 3 and len(w) > 2 and not is_everyday(w)}
        return {c: [w for w in words if w in kept] for c, words in tags.items()}

    def tags(self, concept: str) -> list[str]:
        styles = self.by_concept[concept]
        return self.icons[next(iter(styles.values()))[0]]["tags"]

    def captions(self, row: int) -> list[str]:
        """Every plain caption of one icon: its name, with its style, with its tags, and its synonyms."""
        icon = self.icons[row]
        name = _with_tone(icon["concept"], icon["tone"])
        captions = [name, f"{name}, {style_phrase(icon['style'])}"]
        if icon["tags"]:
            captions.append(f"{name}: {', '.join(icon['tags'])}")
        return captions + self.synonyms[icon["concept"]]

    def svg(self, scene: Scene) -> str:
        return compose_svg(scene.layers, lambda n: self.icons[n]["svg"], scene.background)

    def pixels(self, scene: Scene, size: int = 64) -> np.ndarray:
        """RGB [size, size, 3] uint8, blended from the cached sprites."""
        return compose_sprites(scene.layers, self.sprites, size, scene.background)


def _load_words(path: Path) -> Vocabulary:
    """What people call the concepts, without what the evaluation asks or a scene says; none in a dataset older than these."""
    if not path.exists():
        return Vocabulary()
    found = load_words(path)
    kept = {
        c: Words(**{k: [w for w in words if not is_everyday(w)] for k, words in vars(of).items()}) for c, of in found.of.items()
    }
    of = {concept: words for concept, words in kept.items() if words != Words()}
    telling = {*COLOURS, *BACKGROUNDS, *NUMBERS.values(), *(w for words in _SIZE_WORDS.values() for w in words)}
    nouns, adjectives = ([w for w in kind if w not in telling] for kind in (found.nouns, found.adjectives))
    return Vocabulary(of, nouns, adjectives)


def _countable(concept: str) -> bool:
    words = concept.split()
    return len(words) <= 3 and concept.replace(" ", "").isalpha() and not set(words) & {"and", "no", "with", "of", "button"}


def _with_tone(concept: str, tone: str) -> str:
    return f"{concept} with {tone.replace('-', ' ')} skin" if tone else concept


def style_phrase(style: str) -> str:
    return f"{style} style"


# ---------------------------------------------------------------------------------------------- sampling


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
    synonyms, narrower kinds, and what a dictionary says that they are.
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
    ):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        unknown = set(kinds or ()) - set(KIND_WEIGHTS)
        if unknown:
            raise ValueError(f"unknown kinds of scene {sorted(unknown)}; choose from {list(KIND_WEIGHTS)}")
        unknown = set(groups or {}) - set(GROUP_WEIGHTS)
        if unknown:
            raise ValueError(f"unknown groups of concepts {sorted(unknown)}; choose from {list(GROUP_WEIGHTS)}")
        of_groups = GROUP_WEIGHTS | (groups or {})
        of_kinds = dict(kinds) if isinstance(kinds, Mapping) else {k: KIND_WEIGHTS[k] for k in kinds or KIND_WEIGHTS}
        for name, weights, given in (("groups", of_groups, groups), ("kinds", of_kinds, kinds)):
            wrong = [w for w in weights.values() if not isinstance(w, int | float) or not 0 <= w < float("inf")]
            if wrong or not sum(weights.values()):
                raise ValueError(f"weights of {name} must be numbers of at least 0, not all of them 0, got {given!r}")
        self.icons, self.split, self.seed, self.contrast, self.tones = icons, split, seed, contrast, tones
        for name, share in (("loose", loose), ("words", words)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if words and not icons.words.of:
            raise ValueError("these icons have no other words; build them again with `unclip data emoji`, or set words to 0")
        if not isinstance(all_concepts, int | float) or not 0 <= all_concepts < float("inf"):
            raise ValueError(f"all_concepts must be true, false or a number of at least 0, got {all_concepts!r}")
        self.all_concepts, self.loose, self.words = bool(all_concepts), loose, words
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

    def scene(self, index: int) -> Scene:
        rng = self._rng(index)
        if self.contrast and index % 2 and rng.random() < self.contrast:
            changes = self.changes(self.plan(index - 1))
            if changes:
                return self.lay_out(_pick(rng, changes), rng)
            rng = self._rng(index, 1)
        return self.lay_out(self._plan(rng), rng)

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
            return Plan(kind, (concept,), _pick(rng, list(self.icons.by_concept[concept])))
        if kind == "colour":
            concept = self._concepts[rng.choice(len(self._concepts), p=self._concept_weights)]
        else:
            concept = _pick(rng, self._objects)
        style = _pick(rng, list(self.icons.by_concept[concept]))
        plan = Plan(kind, (concept,), style)
        if kind == "colour":
            colours = self._colours(concept, style)
            return replace(plan, colour=_pick(rng, colours)) if colours else None
        if kind == "count":
            return replace(plan, count=int(rng.integers(2, 6)))
        if kind == "background":
            return replace(plan, background=_pick(rng, list(BACKGROUNDS)))
        if kind == "size":
            return replace(plan, size=_pick(rng, ["small", "large"]))
        other = _pick(rng, self._objects)
        if other == concept or style not in self.icons.by_concept[other]:
            return None
        relation = _pick(rng, list(RELATIONS)) if kind == "relation" else None
        return replace(plan, concepts=(concept, other), relation=relation)

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
        tone = plan.kind == "single" and rng.random() < self.tones
        rows = [self._row(c, plan.style, rng, tone) for c in plan.concepts] * plan.count
        if plan.count > 1:
            spots = _COUNT_SPOTS[plan.count]
        elif plan.relation:
            spots = _RELATION_SPOTS[plan.relation]
        elif len(rows) == 2:
            spots = _RELATION_SPOTS[_pick(rng, ["left", "right"])]
        else:
            side = {"small": 0.42, "large": 1.0}.get(plan.size, rng.uniform(0.84, 0.98))
            spots = ((0.5, 0.5, side),)
        matrix = None
        if plan.colour:
            sprite = np.asarray(self.icons.sprites[rows[0]])
            if colour_share(sprite, plan.colour) < 0.75:
                matrix = turn_to(sprite, plan.colour)
        shrink = rng.uniform(0.9, 1.0) if len(rows) > 1 else 1.0
        layers = []
        for row, (x, y, size) in zip(rows, spots, strict=True):
            dx, dy = rng.uniform(-0.02, 0.02, 2) * (1.0 if size < 0.95 else 0.3)
            layers.append(Layer(row, x + dx, y + dy, size * shrink, matrix))
        ground = WHITE
        if plan.background:
            ground = tuple(int(np.clip(v + rng.integers(-10, 11), 0, 255)) for v in BACKGROUNDS[plan.background])
        tone_name = self.icons.icons[rows[0]]["tone"]
        key = plan.key + (f"|{tone_name}" if tone_name else "")
        caption, names = self._caption(plan, tone_name, layers, rng)
        return Scene(plan.kind, key, plan.style, caption, names, tuple(layers), ground)

    def _row(self, concept: str, style: str, rng: np.random.Generator, tone: bool) -> int:
        rows = self.icons.by_concept[concept][style]
        return int(rows[rng.integers(1, len(rows))]) if tone and len(rows) > 1 else rows[0]

    def _caption(self, plan: Plan, tone: str, layers: Sequence[Layer], rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
        """The caption, and its name for each concept of the plan; of two things without a place the left one comes first."""
        names = [self._name(c, plan.kind, rng) for c in plan.concepts]
        first = _with_tone(names[0], tone)
        if plan.kind == "single":
            tags = self.icons.tags(plan.concepts[0])
            said = self.icons.words.of.get(plan.concepts[0]) if self.words else None
            if said and rng.random() < self.words:
                text = self._in_other_words(first, said, tags, rng)
            elif self.loose and rng.random() < self.loose:
                text = self._loosely(first, tags, rng)
            elif tags and rng.random() < 0.15:
                chosen = rng.permutation(tags)[: int(rng.integers(1, 4))]
                text = f"{first}, {', '.join(chosen)}"
            else:
                text = _pick(rng, [first, first, _a(first), _a(first), f"an emoji of {_a(first)}", f"{first} emoji"])
        elif plan.kind == "pair":
            words = _pick(rng, _PAIR_WORDS)
            text = words.format(*map(_a, names if layers[0].x < layers[1].x else names[::-1]))
        else:
            text = _pick(rng, wordings(plan, names))
        if rng.random() < 0.3:
            phrase = style_phrase(plan.style)
            text = _pick(rng, [f"{text} in {phrase}", f"{text}, {phrase}", f"{phrase}, {text}"])
        if is_everyday(text):
            text, names = wordings(plan)[0], list(plan.concepts)
        return text, tuple(_plural(name) if plan.count > 1 else name for name in names)

    def _loosely(self, name: str, tags: list[str], rng: np.random.Generator) -> str:
        """By two to four tags, or the name among words that say nothing more of the picture."""
        if len(tags) > 1 and rng.random() < 0.5:
            return _pick(rng, [", ", " "]).join(rng.permutation(tags)[: int(rng.integers(2, 5))])
        thing = f"{_pick(rng, _PRAISE)} {name}" if rng.random() < 0.6 else name
        return _pick(rng, _ASKING).format(name=thing, a_name=_a(thing))

    def _in_other_words(self, name: str, said: Words, tags: list[str], rng: np.random.Generator) -> str:
        """By another name, a narrower kind, what it is, or what is heard as it; mostly among words that change nothing."""
        of = _pick(rng, [words for words in ([name], said.names, said.narrower, said.sayings, said.heard, said.heard) if words])
        thing, about = _pick(rng, of), self.icons.words
        if rng.random() < 0.15:
            other = _pick(rng, [name, *said.names, *said.sayings[:1], *tags])
            return thing if other == thing else f"{thing}, {other}"
        if about.adjectives and of is not said.sayings and of is not said.heard and rng.random() < 0.4:
            thing = f"{_pick(rng, about.adjectives)} {thing}"
        if about.nouns and rng.random() < 0.35:
            return _pick(rng, _CONTEXTS).format(name=thing, a_name=_a(thing), noun=_pick(rng, about.nouns))
        return _pick(rng, _ASKING if rng.random() < 0.5 else _PLAIN).format(name=thing, a_name=_a(thing))

    def _name(self, concept: str, kind: str, rng: np.random.Generator) -> str:
        synonyms = self.icons.synonyms[concept]
        if synonyms and rng.random() < (0.2 if kind == "single" else 0.1):
            return _pick(rng, synonyms)
        return concept


def wordings(plan: Plan, names: Sequence[str] | None = None) -> list[str]:
    """The ways to say what a plan shows, the plainest first, without its style; `names` replace those of its concepts."""
    first, *others = names or plan.concepts
    if plan.kind == "single":
        return [first, _a(first), f"an emoji of {_a(first)}", f"{first} emoji"]
    if plan.kind == "colour":
        return [_a(f"{plan.colour} {first}"), f"{plan.colour} {first}", f"{_a(first)} in {plan.colour}"]
    if plan.kind == "count":
        return [f"{NUMBERS[plan.count]} {_plural(first)}"]
    if plan.kind == "background":
        return [f"{_a(first)} on {_a(f'{plan.background} background')}"]
    if plan.kind == "size":
        return [_a(f"{word} {first}") for word in _SIZE_WORDS[plan.size]]
    if plan.kind == "relation":
        return [words.format(_a(first), _a(others[0])) for words in _RELATION_WORDS[plan.relation]]
    return [words.format(*map(_a, order)) for words in _PAIR_WORDS for order in ((first, *others), (*others, first))]


def mentions_style(scene: Scene) -> bool:
    return style_phrase(scene.style) in scene.caption


_PRAISE = (
    *("nice", "pretty", "lovely", "beautiful", "wonderful", "funny", "simple", "great"),
    *("favourite", "typical", "modern", "plain", "perfect", "amazing", "real"),
)
_ASKING = (
    *("{a_name}", "the {name}", "my {name}", "our {name}", "this {name}", "please draw {a_name}", "draw me {a_name}"),
    *("i want {a_name}", "show me the {name}", "a picture of {a_name}", "a drawing of {a_name}", "an icon of {a_name}"),
    *("just {a_name}", "{a_name}, please", "{a_name} for my friend", "{a_name} at home", "{a_name} in front of me"),
    *("{name} today", "{a_name} and nothing else", "look at this {name}"),
)
_PLAIN = ("{name}", "{a_name}")
_CONTEXTS = (
    *("{a_name} in the {noun}", "{a_name} on the {noun}", "{a_name} at the {noun}", "{a_name} near the {noun}"),
    *("{a_name} from the {noun}", "{a_name} of the {noun}", "the {name} of {noun}", "{a_name} for my {noun}"),
    *("{name} for {noun}", "{name} with {noun}", "{name} and its {noun}", "{name}, the {noun}", "{name}: {noun}"),
    *("{noun} {name}", "a {noun} {name}", "the {noun}'s {name}"),
)
_COUNT_SPOTS = {
    2: ((0.26, 0.5, 0.46), (0.74, 0.5, 0.46)),
    3: ((0.5, 0.27, 0.44), (0.26, 0.73, 0.44), (0.74, 0.73, 0.44)),
    4: ((0.26, 0.26, 0.44), (0.74, 0.26, 0.44), (0.26, 0.74, 0.44), (0.74, 0.74, 0.44)),
    5: ((0.2, 0.2, 0.34), (0.8, 0.2, 0.34), (0.5, 0.5, 0.34), (0.2, 0.8, 0.34), (0.8, 0.8, 0.34)),
}
# The first spot is the first-named object's.
_RELATION_SPOTS = {
    "left": ((0.26, 0.5, 0.48), (0.74, 0.5, 0.48)),
    "right": ((0.74, 0.5, 0.48), (0.26, 0.5, 0.48)),
    "above": ((0.5, 0.26, 0.48), (0.5, 0.74, 0.48)),
    "below": ((0.5, 0.74, 0.48), (0.5, 0.26, 0.48)),
    "on top": ((0.5, 0.30, 0.48), (0.5, 0.67, 0.60)),
}
_RELATION_WORDS = {
    "left": ["{} to the left of {}", "{} left of {}"],
    "right": ["{} to the right of {}", "{} right of {}"],
    "above": ["{} above {}", "{} over {}"],
    "below": ["{} below {}", "{} under {}"],
    "on top": ["{} on top of {}"],
}


_SIZE_WORDS = {"small": ["small", "tiny", "little"], "large": ["big", "large", "huge"]}
_PAIR_WORDS = ("{} and {}", "{} with {}", "{} next to {}")


def _pick(rng: np.random.Generator, options: list):
    return options[int(rng.integers(len(options)))]


def _normalised(weights: list[float]) -> np.ndarray:
    return np.asarray(weights) / np.sum(weights)


@cache
def _a(noun: str) -> str:
    """The noun with its article; plurals (scissors, cherries) take none."""
    head = noun.split(" in ")[0].split(" with ")[0].split(" of ")[0]
    plural = _INFLECT.singular_noun(head) and not head.endswith("ss")
    return noun if plural else _INFLECT.a(noun)


@cache
def _plural(noun: str) -> str:
    return _INFLECT.plural_noun(noun) or noun
