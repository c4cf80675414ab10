"""Emoji characters in a prompt, replaced by their names."""

import re
from functools import cache
from pathlib import Path

_TONES = {chr(0x1F3FB + n): tone for n, tone in enumerate(("light", "medium light", "medium", "medium dark", "dark"))}
_PRESENTATION = str.maketrans("", "", "\ufe0e\ufe0f")  # as text or in colour
_ANY_TONE = f"[{''.join(_TONES)}]"


@cache
def names() -> dict[str, str]:
    """Emoji, without presentation selectors, and their English names (emojibase-data 17.0.0)."""
    table = Path(__file__).with_name("characters.tsv").read_text(encoding="utf-8")
    return {emoji: name for name, emoji in (line.split("\t") for line in table.splitlines())}


@cache
def _pattern() -> re.Pattern[str]:
    """Any emoji of the table, a skin tone after any of its characters; the longest sequence first."""
    sequences = sorted(names(), key=len, reverse=True)
    return re.compile("|".join(f"{_ANY_TONE}?".join(map(re.escape, s)) + f"{_ANY_TONE}?" for s in sequences))


def read_characters(text: str) -> str:
    """The text with each emoji replaced by its name: "🐱 and 👍🏽" is "cat face and thumbs up with medium skin".

    A text without emoji is returned as it is.
    """
    if text.isascii():
        return text
    bare = text.translate(_PRESENTATION)
    read = _pattern().sub(lambda found: f" {_name(found[0])} ", bare)
    if read == bare:
        return text
    words = " ".join(read.replace("\u200d", " ").split())  # a joiner between two characters that form no emoji
    return re.sub(r" (?=[,.;:!?])", "", words)


def _name(emoji: str) -> str:
    tone = next((_TONES[c] for c in emoji if c in _TONES), None)
    name = names()[re.sub(_ANY_TONE, "", emoji)]
    return f"{name} with {tone} skin" if tone else name
