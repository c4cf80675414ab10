"""What people write of one icon, beside its name: tags, other words, definitions, facts of the drawing, in whole sentences."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .captions import with_article
from .plans import NUMBERS
from .render import drawn_colours, parts
from .words import Vocabulary, Words

PRAISE = (
    *("nice", "pretty", "lovely", "beautiful", "wonderful", "funny", "simple", "great"),
    *("favourite", "typical", "modern", "plain", "perfect", "amazing", "real"),
)
ASKING = (
    *("{a_name}", "the {name}", "my {name}", "our {name}", "this {name}", "please draw {a_name}", "draw me {a_name}"),
    *("i want {a_name}", "show me the {name}", "a picture of {a_name}", "a drawing of {a_name}", "an icon of {a_name}"),
    *("just {a_name}", "{a_name}, please", "{a_name} for my friend", "{a_name} at home", "{a_name} in front of me"),
    *("{name} today", "{a_name} and nothing else", "look at this {name}"),
)
PLAIN = ("{name}", "{a_name}")
CONTEXTS = (
    *("{a_name} in the {noun}", "{a_name} on the {noun}", "{a_name} at the {noun}", "{a_name} near the {noun}"),
    *("{a_name} from the {noun}", "{a_name} of the {noun}", "the {name} of {noun}", "{a_name} for my {noun}"),
    *("{name} for {noun}", "{name} with {noun}", "{name} and its {noun}", "{name}, the {noun}", "{name}: {noun}"),
    *("{noun} {name}", "a {noun} {name}", "the {noun}'s {name}"),
)
# Of a sentence's {x}, a noun phrase with its article.
WISHES = (
    *(
        "{x}",
        "{x}",
        "{x}",
        "draw {x}",
        "can you draw {x}",
        "could you make {x} for me",
        "i want {x}",
        "i need {x}",
        "give me {x}",
    ),
    *("{x} please", "{x}, please", "make me {x}", "let's see {x}", "how about {x}", "an icon of {x}", "a sticker of {x}"),
    *("a simple drawing of {x}", "i would like {x}", "something like {x}", "what about {x}?", "{x} for my chat", "only {x}"),
)
FEELINGS = ("i am {tag}", "i feel {tag}", "so {tag}", "feeling {tag} today", "someone who is {tag}", "when you feel {tag}")


@dataclass(frozen=True)
class Drawn:
    """Facts of a drawing: its `colours`, the largest first, and of how many alike `parts` it is."""

    colours: tuple[str, ...]
    parts: int


def drawn(sprite: np.ndarray) -> Drawn:
    """The facts of a sprite [H, W, 4] uint8, RGBA."""
    return Drawn(drawn_colours(sprite), parts(sprite))


def loosely(name: str, tags: list[str], rng: np.random.Generator) -> str:
    """By two to four tags, or the name among words that say nothing more of the image."""
    if len(tags) > 1 and rng.random() < 0.5:
        return pick(rng, [", ", " "]).join(rng.permutation(tags)[: int(rng.integers(2, 5))])
    thing = f"{pick(rng, PRAISE)} {name}" if rng.random() < 0.6 else name
    return pick(rng, ASKING).format(name=thing, a_name=with_article(thing))


def in_other_words(name: str, said: Words, tags: list[str], about: Vocabulary, rng: np.random.Generator) -> str:
    """By another name, a narrower kind, what it is, or what is heard as it; mostly among words that change nothing."""
    of = pick(rng, [words for words in ([name], said.names, said.narrower, said.sayings, said.heard, said.heard) if words])
    thing = pick(rng, of)
    if rng.random() < 0.15:
        other = pick(rng, [name, *said.names, *said.sayings[:1], *tags])
        return thing if other == thing else f"{thing}, {other}"
    if about.adjectives and of is not said.sayings and of is not said.heard and rng.random() < 0.4:
        thing = f"{pick(rng, about.adjectives)} {thing}"
    if about.nouns and rng.random() < 0.35:
        return pick(rng, CONTEXTS).format(name=thing, a_name=with_article(thing), noun=pick(rng, about.nouns))
    return pick(rng, ASKING if rng.random() < 0.5 else PLAIN).format(name=thing, a_name=with_article(thing))


def sentence(name: str, tags: list[str], said: Words, facts: Drawn, rng: np.random.Generator) -> str:
    """A sentence that is true of the icon: its name or another, with its colours, tags, number of parts or definition."""
    tags = [tag for tag in tags if not any(map(str.isdigit, tag))]
    called = pick(rng, [name, name, *said.names[:4]])
    ways = [lambda: called, lambda: _coloured(called, facts, rng), lambda: _coloured(called, facts, rng)]
    if tags:
        ways += [lambda: _tagged(called, tags, rng), lambda: _hinted(tags, facts, rng)]
    if tags and name.endswith(" face") and rng.random() < 0.4:
        return pick(rng, FEELINGS).format(tag=pick(rng, tags))
    if said.sayings:
        ways += [lambda: _defined(said.sayings[0], tags, facts, rng)] * 2
    if facts.parts > 1 and with_article(name) == name:  # a plural
        ways.append(lambda: f"{NUMBERS[facts.parts]} {name}")
    return _wish(pick(rng, ways)(), rng)


def _wish(thing: str, rng: np.random.Generator) -> str:
    said = with_article(thing) if rng.random() < 0.8 else thing
    return pick(rng, WISHES).format(x=said)


def _coloured(name: str, facts: Drawn, rng: np.random.Generator) -> str:
    if not facts.colours:
        return name
    first, *others = facts.colours
    if others and rng.random() < 0.5:
        return pick(rng, [f"{first} and {others[0]} {name}", f"{name} in {first} and {others[0]}"])
    return pick(rng, [f"{first} {name}", f"{name} that is {first}", f"mostly {first} {name}"])


def _tagged(name: str, tags: list[str], rng: np.random.Generator) -> str:
    tag = pick(rng, tags)
    return pick(rng, [f"{name} for {tag}", f"{tag} {name}", f"{name}, {tag}", f"{name} that makes me think of {tag}"])


def _hinted(tags: list[str], facts: Drawn, rng: np.random.Generator) -> str:
    """By tags and colours alone."""
    hints = list(rng.permutation(tags)[: int(rng.integers(1, 4))])
    colour = facts.colours[:1] if rng.random() < 0.6 else ()
    return pick(rng, [" ".join([*colour, *hints]), f"{' '.join([*colour, 'thing'])}: {', '.join(hints)}"])


def _defined(saying: str, tags: list[str], facts: Drawn, rng: np.random.Generator) -> str:
    saying = saying.removeprefix("any ")
    if facts.colours and rng.random() < 0.4:
        return f"{saying}, {facts.colours[0]}"
    if tags and rng.random() < 0.3:
        return f"{saying}, {pick(rng, tags)}"
    return saying


def pick(rng: np.random.Generator, options: list | tuple) -> Any:
    return options[int(rng.integers(len(options)))]
