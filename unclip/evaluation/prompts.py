"""The prompts of the evaluation, and the questions that the judge answers. The splits dev and test share no prompt."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..data.icon_packages import STYLES
from ..data.judged import KINDS, attribute_changes, caption
from ..data.scenes import IconSet, Plan, Scene, SceneSampler, everyday_prompts, split_of_concept, split_of_icon

SPLITS = {
    "dev": "validation",
    "test": "test",
}  # of the evaluation -> of the data
SEED = 20_261
PER_KIND = 100
DISTRACTORS = 99
COMMON = (  # common concepts, to compare two models by eye
    *("cat face", "dog face", "rabbit face", "bear", "fox", "lion", "pig face", "elephant", "horse", "penguin", "owl"),
    *("butterfly", "fish", "octopus", "turtle", "honeybee", "unicorn", "frog", "red heart", "star", "grinning face"),
    *("smiling face with sunglasses", "robot", "ghost", "pizza", "hamburger", "birthday cake", "ice cream", "red apple"),
    *("banana", "strawberry", "hot beverage", "automobile", "airplane", "rocket", "bicycle", "sailboat", "house"),
    *("evergreen tree", "sunflower", "sun", "rainbow", "snowman", "umbrella", "guitar", "soccer ball", "crown", "light bulb"),
)
TRIES = 40  # scenes sampled for each prompt that is wanted, at most
ATTRIBUTE = {"colour": "colour", "count": "number", "relation": "place", "background": "ground", "style": "style"}


@dataclass(frozen=True)
class Prompt:
    """A prompt with its ground truth.

    Attributes:
        text: The prompt.
        truth: A scene of which the text is true.
        right: The concepts that count as right.
        plan: Of a composition or an attachment.
        known: False for a concept that CLIP was not trained on, nor decoder and prior without `data.all_concepts`.
    """

    text: str
    truth: Scene
    right: tuple[str, ...]
    plan: Plan | None = None
    known: bool = True

    @property
    def composition(self) -> Plan:
        """`plan`, for prompts that have one."""
        if self.plan is None:
            raise ValueError(f"the prompt {self.text!r} has no plan")
        return self.plan


@dataclass(frozen=True)
class Question:
    """Which of `options` does the image show? The first is right, chance is 1 / len(options)."""

    about: str
    options: tuple[Plan, ...]
    styled: bool = False

    @cached_property
    def captions(self) -> tuple[str, ...]:
        return tuple(caption(plan, plan.style if self.styled else None) for plan in self.options)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be dev or test, got {split!r}")


def recognition(icons: IconSet, split: str, turn: int = 0) -> list[Prompt]:
    """Single concepts by their names, half of all in each split, in a random but fixed order.

    Each `turn` has the same names with other real renders, as long as there are styles.
    """
    check_split(split)
    sampler = SceneSampler(icons, "all", SEED, tones=0.0)
    chosen = [c for c in icons.recognisable if _digest("half", c) % 2 == list(SPLITS).index(split)]
    found = []
    for concept in sorted(chosen, key=lambda c: _digest("order", c)):
        truth = _single(sampler, concept, turn)
        found.append(Prompt(concept, truth, (concept,), known=split_of_concept(concept) == "train"))
    return found


def everyday(icons: IconSet, split: str) -> list[Prompt]:
    """Everyday English: every other prompt of unclip/data/everyday.yaml, as far as these icons have its concepts."""
    check_split(split)
    sampler = SceneSampler(icons, "all", SEED, tones=0.0)
    found = []
    for text, concepts in list(everyday_prompts().items())[list(SPLITS).index(split) :: 2]:
        right = tuple(c for c in concepts if c in icons.by_concept)
        if right:
            found.append(Prompt(text, _single(sampler, right[0]), right))
    return found


def common(icons: IconSet) -> list[Prompt]:
    """The `COMMON` names that these icons have, the same in both splits: for comparison by eye only."""
    sampler = SceneSampler(icons, "all", SEED, tones=0.0)
    return [Prompt(concept, _single(sampler, concept), (concept,)) for concept in COMMON if concept in icons.by_concept]


def composition(icons: IconSet, split: str, per_kind: int = PER_KIND) -> dict[str, list[Prompt]]:
    """For each kind, prompts whose combination was held out of training while its parts were not."""
    check_split(split)
    return {kind: list(_held_out(icons, split, kind, per_kind)) for kind in (*KINDS, "style")}


def attachments(icons: IconSet, split: str, count: int = PER_KIND) -> list[Prompt]:
    """Prompts of one thing attached to another, with combinations that were held out of training."""
    check_split(split)
    sampler = SceneSampler(icons, SPLITS[split], SEED, kinds=("attachment",), tones=0.0)
    known = set(icons.recognisable)
    found: dict[str, Prompt] = {}
    for index in range(TRIES * count):
        try:
            plan = sampler.plan(index)
        except ValueError:  # these icons allow no such scene
            break
        plain = len(plan.concepts) == 2 and not plan.colours and not plan.background
        if plain and known.issuperset(plan.concepts) and {split_of_icon(c, plan.style) for c in plan.concepts} == {"train"}:
            truth = sampler.lay_out(plan, np.random.default_rng([SEED, 1, index]))
            found.setdefault(caption(plan), Prompt(caption(plan), truth, plan.concepts, plan))
        if len(found) == count:
            break
    return list(found.values())


def scenes(icons: IconSet, split: str, count: int, first: int = 0) -> list[Prompt]:
    """Scenes of every kind, in their usual shares, that are held out of any training, for distances between sets."""
    check_split(split)
    sampler = SceneSampler(icons, SPLITS[split], SEED + 1, all_concepts=True)
    drawn = [sampler.scene(n) for n in range(first, first + count)]
    return [Prompt(s.caption, s, ()) for s in drawn]


def questions(prompt: Prompt, icons: IconSet) -> list[Question]:
    """The questions for a composition: each object among 100, and its attribute among all values."""
    plan = prompt.composition
    styled = plan.kind == "single"
    shown = replace(plan, kind="pair", relation=None) if len(plan.concepts) == 2 else plan  # places are a question of their own
    rng = np.random.default_rng(_digest("distractors", prompt.text) % 2**63)
    known = set(icons.recognisable)
    pool = [c for c in icons.objects if c in known and c not in plan.concepts]
    found = []
    for place in range(len(plan.concepts)):
        others = [pool[n] for n in rng.permutation(len(pool))[:DISTRACTORS]]
        plans = [replace(shown, concepts=tuple(o if n == place else c for n, c in enumerate(plan.concepts))) for o in others]
        name = "object" if len(plan.concepts) == 1 else ("first object", "second object")[place]
        found.append(Question(name, (shown, *plans), styled))
    if styled:
        others = [replace(plan, style=s) for s in STYLES if s != plan.style]
        found.append(Question("style", (plan, *others), styled))
    elif plan.kind in ATTRIBUTE:
        found.append(Question(ATTRIBUTE[plan.kind], (plan, *attribute_changes(plan))))
    return found


def _held_out(icons: IconSet, split: str, kind: str, count: int) -> Iterator[Prompt]:
    sampler = SceneSampler(icons, SPLITS[split], SEED, kinds=("single" if kind == "style" else kind,), tones=0.0)
    known, seen = set(icons.recognisable), set()
    for index in range(TRIES * count):
        try:
            plan = sampler.plan(index)
        except ValueError:  # these icons allow no such scene
            return
        parts = {split_of_concept(c) if kind == "style" else split_of_icon(c, plan.style) for c in plan.concepts}
        text = caption(plan, plan.style if kind == "style" else None)
        if parts != {"train"} or not known.issuperset(plan.concepts) or plan.relation == "on top" or text in seen:
            continue
        seen.add(text)
        truth = sampler.lay_out(plan, np.random.default_rng([SEED, 1, index]))
        yield Prompt(text, truth, plan.concepts, plan)
        if len(seen) == count:
            return


def _single(sampler: SceneSampler, concept: str, turn: int = 0) -> Scene:
    styles = list(sampler.icons.by_concept[concept])
    number = _digest("style", concept) + turn
    plan = Plan("single", (concept,), styles[number % len(styles)])
    return sampler.lay_out(plan, np.random.default_rng([SEED, number % 2**32]))


def _digest(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("|".join(("evaluation", *words)).encode()).digest()[:8], "big")
