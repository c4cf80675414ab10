"""Captions of one icon beyond its name: tags, synonyms, definitions and drawing facts, also in whole sentences."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .captions import with_article
from .plans import NUMBERS
from .render import count_parts, dominant_colours
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
class DrawingFacts:
    """The dominant `colours` of a drawing, the largest first, and the number of similar `parts` it consists of."""

    colours: tuple[str, ...]
    parts: int


def drawing_facts(sprite: np.ndarray) -> DrawingFacts:
    """The facts of a sprite [H, W, 4] uint8, RGBA."""
    return DrawingFacts(dominant_colours(sprite), count_parts(sprite))


def informal_caption(name: str, tags: list[str], rng: np.random.Generator) -> str:
    """Two to four tags, or the name among words that add nothing to it."""
    if len(tags) > 1 and rng.random() < 0.5:
        return choose(rng, [", ", " "]).join(rng.permutation(tags)[: int(rng.integers(2, 5))])
    thing = f"{choose(rng, PRAISE)} {name}" if rng.random() < 0.6 else name
    return choose(rng, ASKING).format(name=thing, a_name=with_article(thing))


def synonym_caption(name: str, words: Words, tags: list[str], vocabulary: Vocabulary, rng: np.random.Generator) -> str:
    """A synonym, narrower kind, definition or pseudo-labelled phrase, sometimes among words that add nothing."""
    lists = ([name], words.names, words.narrower, words.sayings, words.heard, words.heard)
    source = choose(rng, [found for found in lists if found])
    thing = choose(rng, source)
    if rng.random() < 0.15:
        other = choose(rng, [name, *words.names, *words.sayings[:1], *tags])
        return thing if other == thing else f"{thing}, {other}"
    if vocabulary.adjectives and source is not words.sayings and source is not words.heard and rng.random() < 0.4:
        thing = f"{choose(rng, vocabulary.adjectives)} {thing}"
    if vocabulary.nouns and rng.random() < 0.35:
        return choose(rng, CONTEXTS).format(name=thing, a_name=with_article(thing), noun=choose(rng, vocabulary.nouns))
    return choose(rng, ASKING if rng.random() < 0.5 else PLAIN).format(name=thing, a_name=with_article(thing))


def sentence_caption(name: str, tags: list[str], words: Words, facts: DrawingFacts, rng: np.random.Generator) -> str:
    """A sentence that is true of the icon: its name or another, with its colours, tags, number of parts or definition."""
    tags = [tag for tag in tags if not any(map(str.isdigit, tag))]
    noun = choose(rng, [name, name, *words.names[:4]])
    ways = [lambda: noun, lambda: _coloured(noun, facts, rng), lambda: _coloured(noun, facts, rng)]
    if tags:
        ways += [lambda: _tagged(noun, tags, rng), lambda: _from_tags(tags, facts, rng)]
    if tags and name.endswith(" face") and rng.random() < 0.4:
        return choose(rng, FEELINGS).format(tag=choose(rng, tags))
    if words.sayings:
        ways += [lambda: _defined(words.sayings[0], tags, facts, rng)] * 2
    if facts.parts > 1 and with_article(name) == name:  # a plural
        ways.append(lambda: f"{NUMBERS[facts.parts]} {name}")
    return _wish(choose(rng, ways)(), rng)


def _wish(thing: str, rng: np.random.Generator) -> str:
    said = with_article(thing) if rng.random() < 0.8 else thing
    return choose(rng, WISHES).format(x=said)


def _coloured(name: str, facts: DrawingFacts, rng: np.random.Generator) -> str:
    if not facts.colours:
        return name
    first, *others = facts.colours
    if others and rng.random() < 0.5:
        return choose(rng, [f"{first} and {others[0]} {name}", f"{name} in {first} and {others[0]}"])
    return choose(rng, [f"{first} {name}", f"{name} that is {first}", f"mostly {first} {name}"])


def _tagged(name: str, tags: list[str], rng: np.random.Generator) -> str:
    tag = choose(rng, tags)
    return choose(rng, [f"{name} for {tag}", f"{tag} {name}", f"{name}, {tag}", f"{name} that makes me think of {tag}"])


def _from_tags(tags: list[str], facts: DrawingFacts, rng: np.random.Generator) -> str:
    """Tags and perhaps a colour, without a name."""
    hints = list(rng.permutation(tags)[: int(rng.integers(1, 4))])
    colour = facts.colours[:1] if rng.random() < 0.6 else ()
    return choose(rng, [" ".join([*colour, *hints]), f"{' '.join([*colour, 'thing'])}: {', '.join(hints)}"])


def _defined(definition: str, tags: list[str], facts: DrawingFacts, rng: np.random.Generator) -> str:
    definition = definition.removeprefix("any ")
    if facts.colours and rng.random() < 0.4:
        return f"{definition}, {facts.colours[0]}"
    if tags and rng.random() < 0.3:
        return f"{definition}, {choose(rng, tags)}"
    return definition


def choose(rng: np.random.Generator, options: list | tuple) -> Any:
    return options[int(rng.integers(len(options)))]
