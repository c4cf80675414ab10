"""WordNet, keywords and short codes in their packages' own layout, for tests of what reads them."""

import json
import re

from unclip.data.emoji import NAMES
from unclip.data.words import KEYWORDS, WORDNET


def write_words(npm, nouns, keywords, others=(), codes=None, used=()):
    """WordNet, keywords and short codes, and how often each sense is `used`, as "word%1 7".

    `others` are adjectives and verbs, by part. A line of these and of nouns is a synset,
    "word word_two 05 >below_word &like_word | gloss".
    """
    for part, lines in ({"noun": nouns, "adj": (), "verb": ()} | dict(others)).items():
        offsets = {words[0]: f"{8 + n:08d}" for n, words in enumerate(line.split() for line in lines)}
        data, senses = ["  1 a licence"], {}
        for line in lines:
            head, gloss = line.split("|", 1)
            fields = head.split()
            words = [f for f in fields if not f.isdigit() and f[0] not in ">&"]
            links = [("~" if f[0] == ">" else "&", offsets[f[1:]]) for f in fields if f[0] in ">&"]
            pointers = " ".join(f"{kind} {to} {part[0]} 0000" for kind, to in links)
            file = next(f for f in fields if f.isdigit())
            listed = " ".join(f"{w.partition('#')[0]} 0" for w in words)
            offset = offsets[words[0]]
            data.append(f"{offset} {file} {part[0]} {len(words):02x} {listed} {len(links):03d} {pointers} |{gloss}")
            for word in words:
                senses.setdefault(re.split(r"#|\(", word)[0], []).append(offset)
        index = [f"{w} {part[0]} {len(at)} 1 ~ {len(at)} 0 {' '.join(at)}  " for w, at in senses.items()]
        folder = npm / "-".join(WORDNET) / "dict"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"data.{part}").write_text("\n".join(data) + "\n")
        (folder / f"index.{part}").write_text("\n".join(["  1 a licence", *index]) + "\n")
    (npm / "-".join(WORDNET) / "dict" / "index.sense").write_text(
        "".join(f"{sense}:05:00:: 00000008 1 {count}\n" for sense, count in map(str.split, used))
    )
    for package in (WORDNET, KEYWORDS):
        (npm / "-".join(package) / "dist").mkdir(parents=True, exist_ok=True)
        (npm / "-".join(package) / "package.json").write_text("{}")
    (npm / "-".join(KEYWORDS) / "dist" / "emoji-en-US.json").write_text(json.dumps(keywords))
    shortcodes = npm / "-".join(NAMES) / "en" / "shortcodes"
    shortcodes.mkdir(parents=True, exist_ok=True)
    for name in ("github", "iamcal", "joypixels"):
        (shortcodes / f"{name}.json").write_text(json.dumps(codes or {}))
