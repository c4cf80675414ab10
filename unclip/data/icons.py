"""The icons of scenes: sprites, names, groups and vocabulary, read from a built dataset."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decoder.layout import POSE_SIZE

from ..io.pixels import uint8_to_float
from .captions import SIZE_WORDS, is_everyday, style_phrase, with_tone
from .plans import NUMBERS, Scene
from .render import BACKGROUNDS, COLOURS, area_weights, compose_sprites, compose_svg
from .shapes import shape_icons
from .words import Vocabulary, Words, load_words

OBJECT_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
_LETTERS = re.compile(r"\bbutton\b|^keycap|^input |^(circled m|copyright|registered|trade mark|atm sign|information)$")


@dataclass
class IconSet:
    """The icons of scenes, as `unclip data emoji` saves them in a folder."""

    icons: list[dict]
    sprites: np.ndarray = field(repr=False)  # [N, 64, 64, 4] uint8 RGBA, memory-mapped
    words_file: Path | None = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> "IconSet":
        """The icons of a built dataset, or the plain shapes when `folder` is "shapes".

        Raises FileNotFoundError, with what to run, when the folder holds no built dataset.
        """
        if str(folder) == "shapes":
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
        """The vocabulary of the concepts, read at first use."""
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
        sprites = uint8_to_float(torch.from_numpy(self.sprites[list(rows)]).permute(0, 3, 1, 2))
        return sprites[:, :3] * sprites[:, 3:] + 1 - sprites[:, 3:]

    def in_pose(self, rows: Sequence[int], size: int = 64, opacity: bool = False) -> Tensor:
        """Single icons as they are trained on: POSE_SIZE of the side, centred on white. [N, 3, size, size] in [0, 1].

        Equal to `pixels` of a scene of one such layer. With `opacity` that is a fourth channel.
        """
        side = POSE_SIZE * size
        start = (size - side) / 2
        weights = torch.from_numpy(area_weights(self.sprites.shape[1], start, side, 0, size))  # [size, S]
        sprites = uint8_to_float(torch.from_numpy(self.sprites[list(rows)]).permute(0, 3, 1, 2))
        colours = torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)  # premultiplied
        colours = weights @ colours @ weights.T
        on_white = (colours[:, :3] + 1 - colours[:, 3:]).clamp(0, 1)
        return torch.cat([on_white, colours[:, 3:]], 1) if opacity else on_white

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
        """Concepts that can be recognised in an image: no flags, and nothing that is mostly letters or digits."""
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
        name = with_tone(icon["concept"], icon["tone"])
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
    """The vocabulary without everyday prompts and attribute words; empty for a dataset that was built without words."""
    if not path.exists():
        return Vocabulary()
    found = load_words(path)
    kept = {
        c: Words(**{k: [w for w in words if not is_everyday(w)] for k, words in vars(of).items()}) for c, of in found.of.items()
    }
    of = {concept: words for concept, words in kept.items() if words != Words()}
    attributes = {*COLOURS, *BACKGROUNDS, *NUMBERS.values(), *(w for words in SIZE_WORDS.values() for w in words)}
    nouns, adjectives = ([w for w in kind if w not in attributes] for kind in (found.nouns, found.adjectives))
    return Vocabulary(of, nouns, adjectives)


def _countable(concept: str) -> bool:
    words = concept.split()
    return len(words) <= 3 and concept.replace(" ", "").isalpha() and not set(words) & {"and", "no", "with", "of", "button"}
