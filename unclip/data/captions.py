"""Captions of scenes: wordings with articles and plurals, and the everyday prompts that no caption may repeat."""

import re
from collections.abc import Sequence
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import yaml

from .anchors import common_name
from .plans import NUMBERS, OPTIONAL_KINDS, Plan, Scene

_STYLE_WORDS = re.compile(r"\b(in )?(noto|flat|3d|twemoji) style\b")


@cache
def _inflect() -> Any:
    """inflect's engine, imported at first use: importing it takes seconds, because typeguard instruments it."""
    import inflect

    return inflect.engine()


@cache
def everyday_prompts() -> dict[str, tuple[str, ...]]:
    """The everyday prompts of the evaluation with the concepts that are right for each; no training caption equals one."""
    table = yaml.safe_load((Path(__file__).parent / "everyday.yaml").read_text(encoding="utf-8"))
    return {prompt: tuple(concepts) for prompt, concepts in table.items()}


@cache
def _everyday_texts() -> frozenset[str]:
    return frozenset(map(_normalised, everyday_prompts()))


def is_everyday(caption: str) -> bool:
    """Whether a caption equals an everyday prompt, up to case, articles, "emoji" and a style."""
    return _normalised(caption) in _everyday_texts()


def _normalised(caption: str) -> str:
    text = " ".join(_STYLE_WORDS.sub(" ", caption.lower()).replace(",", " ").replace("-", " ").split())
    text = text.removeprefix("an emoji of ").removesuffix(" emoji")
    return text.removeprefix("a ").removeprefix("an ").removeprefix("the ")


def with_tone(concept: str, tone: str) -> str:
    return f"{concept} with {tone.replace('-', ' ')} skin" if tone else concept


def style_phrase(style: str) -> str:
    return f"{style} style"


def wordings(plan: Plan, names: Sequence[str] | None = None) -> list[str]:
    """All captions of a plan without its style, the plainest first; `names` replace the names of its concepts."""
    if plan.kind in OPTIONAL_KINDS:
        return _optional_wordings(plan, list(names or map(common_name, plan.concepts)))
    first, *others = names or plan.concepts
    if plan.kind == "single":
        return [first, with_article(first), f"an emoji of {with_article(first)}", f"{first} emoji"]
    if plan.kind == "colour":
        return [with_article(f"{plan.colour} {first}"), f"{plan.colour} {first}", f"{with_article(first)} in {plan.colour}"]
    if plan.kind == "count":
        return [f"{NUMBERS[plan.count]} {plural(first)}"]
    if plan.kind == "background":
        return [f"{with_article(first)} on {with_article(f'{plan.background} background')}"]
    if plan.kind == "size":
        return [with_article(f"{word} {first}") for word in SIZE_WORDS[plan.size]]
    if plan.kind == "relation":
        return [words.format(with_article(first), with_article(others[0])) for words in RELATION_WORDS[plan.relation]]
    return [words.format(*map(with_article, order)) for words in PAIR_WORDS for order in ((first, *others), (*others, first))]


def _optional_wordings(plan: Plan, names: list[str]) -> list[str]:
    """`wordings` of OPTIONAL_KINDS."""
    colours = plan.colours or ("",) * len(names)
    names = [f"{colour} {name}".strip() for colour, name in zip(colours, names, strict=True)]
    texts = []
    for first, *others in (list(map(with_article, names)), names):
        if plan.kind == "ground":
            texts.append(first)
        elif plan.kind == "attachment":
            relation = "on" if plan.relation == "inside" and names[0] == "plate" else plan.relation
            texts += [words.format(first, " and ".join(others), names[-1]) for words in ATTACHED_WORDS[relation]]
        elif len(others) == 2:
            texts += [f"{first}, {others[0]} and {others[1]}", f"{first} and {others[0]} and {others[1]}"]
        else:
            texts += [f"two {plural(names[0])} and {others[0]}", f"{others[0]} and two {plural(names[0])}"]
    grounds = GROUND_WORDS[plan.background] if plan.background else ["{}"]
    return [words.format(text) for words in grounds for text in texts]


def mentions_style(scene: Scene) -> bool:
    return style_phrase(scene.style) in scene.caption


RELATION_WORDS: dict[str | None, list[str]] = {
    "left": ["{} to the left of {}", "{} left of {}"],
    "right": ["{} to the right of {}", "{} right of {}"],
    "above": ["{} above {}", "{} over {}"],
    "below": ["{} below {}", "{} under {}"],
    "on top": ["{} on top of {}"],
}


# {0} is the base and {1} the thing, with their articles; {2} is the thing without.
ATTACHED_WORDS: dict[str | None, list[str]] = {
    "wearing": ["{0} wearing {1}", "{0} with {1}", "{0} in {1}", "{0} with {1} on", "{1} on {0}"],
    "holding": ["{0} holding {1}", "{0} with {1} in its hand", "{0} carrying {1}", "{0} holding up {1}"],
    "riding": ["{1} riding {0}", "{1} riding on {0}", "{1} on {0}", "{0} with {1} on it"],
    "sitting": ["{1} sitting on {0}", "{1} on {0}", "{0} with {1} on it"],
    "inside": ["{1} in {0}", "{1} inside {0}", "{0} with {1} in it"],
    "on": ["{1} on {0}", "{0} with {1} on it"],
    "badge": ["{0} with {1} in the corner", "{0} and a small {2} in the corner", "{0} with {1} as a badge"],
    "face": ["{0} with the face of {1}", "{0} with the head of {1}", "{0} that has the face of {1}"],
}
GROUND_WORDS: dict[str | None, list[str]] = {
    "grass": ["{} on green grass", "{} on the grass", "{} on a meadow", "{} in a green field"],
    "night": ["{} at night", "{} in the night", "{} in the dark"],
    "sea": ["{} in the sea", "{} in the ocean", "{} under water", "{} in the water"],
    "snow": ["{} in the snow", "{} on snow", "{} on a snowy day"],
    "sand": ["{} on the beach", "{} in the desert", "{} on sand"],
    "space": ["{} in space", "{} in outer space"],
    "sky": ["{} in the sky", "{} in the blue sky", "{} high up in the sky"],
    "forest": ["{} in the forest", "{} in the woods", "{} in the jungle"],
    "sunset": ["{} at sunset", "{} in the evening", "{} in the evening light"],
}
SIZE_WORDS: dict[str | None, list[str]] = {"small": ["small", "tiny", "little"], "large": ["big", "large", "huge"]}
PAIR_WORDS = ("{} and {}", "{} with {}", "{} next to {}")


@cache
def with_article(noun: str) -> str:
    """The noun with its article; plurals (scissors, cherries) take none."""
    head = noun.split(" in ")[0].split(" with ")[0].split(" of ")[0]
    plural = _inflect().singular_noun(head) and not head.endswith("ss")
    return noun if plural else _inflect().a(noun)


@cache
def plural(noun: str) -> str:
    return _inflect().plural_noun(noun) or noun


def name_spans(caption: str, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The characters of names in a caption, without overlap ("dog" within "hot dog" is no match); () if one is missing."""
    spans = [[m.span() for m in _name_pattern(name).finditer(caption)] for name in names]
    apart = (s for s in product(*spans) if all(a[1] <= b[0] or b[1] <= a[0] for a, b in combinations(s, 2)))
    return next(apart, ())


@cache
def _name_pattern(name: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


def scene_spans(scene: Scene) -> tuple[tuple[int, int], ...]:
    """The characters that name the one or two concepts of a scene in their own colours; () for other scenes."""
    coloured = any(layer.matrix is not None for layer in scene.layers)  # the icon no longer looks like its concept
    return () if coloured or len(scene.names) > 2 else name_spans(scene.caption, scene.names)


def concepts_of_layers(scene: Scene) -> tuple[int, ...]:
    """The number of the concept that each layer shows."""
    return scene.order or tuple(n % len(scene.names) for n in range(len(scene.layers)))
