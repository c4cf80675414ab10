"""Banks of plans: what a million scenes show and how their captions are spelt, made ahead and packed into one file.

A training step that makes its batch from a bank (`BankScenes`) does no work on text and reads no image on the host. Reading a
bank needs neither the dataset that it was made from nor the libraries that captions are written with.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import write_beside
from ..config import ConfigError
from .emoji import SKIN_TONES, STYLES
from .layouts import LAYOUTS
from .plans import Plan
from .render import BACKGROUNDS, COLOURS

FORMAT = 1
NO_ICON = 2**16 - 1
NAMED, NAMES_STYLE = 0b011, 0b100  # of a caption's flags: how many of the things it names, and whether it names the style


@dataclass
class PlanBank:
    """P plans, U distinct captions of T tokens in all, N icons, M recoloured icons.

    Attributes:
        facts: JSON-like; what the bank was made of (`data`, `split`, `seed`), the fingerprints of the `sprites` and of the
            `tokenizer`, its `length` and `pad` token, and the names of the `concepts`.
        icons: uint16 [P, 2], the rows of the icons of one or two concepts, NO_ICON for none.
        layouts: uint8 [P], rows of `LAYOUTS`.
        colours: uint8 [P], 0 for none, else 1 + the number in `COLOURS`.
        grounds: uint8 [P], 0 for white, else 1 + the number in `BACKGROUNDS`.
        captions: int32 [P], numbers of captions, in the order of their first use.
        tokens: uint16 [T], the captions' tokens one after the other.
        lengths: uint8 [U], in tokens.
        spans: uint8 [U, 4], first token and the one past the last of the first name, and of the second; 0, 0 for none.
        flags: uint8 [U], NAMED and NAMES_STYLE.
        empty: uint16, the tokens of the empty caption.
        turned: uint32 [M], ascending: icon * 8 + colour, as in `colours`, where the icon needs a matrix to have the colour.
        matrices: float32 [M, 9], these colour matrices.
        icon_concepts, icon_styles, icon_tones: uint16 and uint8 [N], numbers in facts["concepts"], `STYLES`, and
            `SKIN_TONES` (1 + number; 0 for none).
    """

    facts: dict[str, Any]
    icons: np.ndarray
    layouts: np.ndarray
    colours: np.ndarray
    grounds: np.ndarray
    captions: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    flags: np.ndarray
    empty: np.ndarray
    turned: np.ndarray
    matrices: np.ndarray
    icon_concepts: np.ndarray
    icon_styles: np.ndarray
    icon_tones: np.ndarray

    def __len__(self) -> int:
        return len(self.layouts)

    def plan(self, number: int) -> Plan:
        """What the plan says, as a sampler would have it."""
        rows = [row for row in self.icons[number].tolist() if row != NO_ICON]
        layout, colour, ground = LAYOUTS[self.layouts[number]], self.colours[number], self.grounds[number]
        return Plan(
            layout.kind,
            tuple(self.facts["concepts"][self.icon_concepts[row]] for row in rows),
            STYLES[self.icon_styles[rows[0]]],
            colour=list(COLOURS)[colour - 1] if colour else None,
            count=layout.count,
            relation=layout.relation if layout.kind == "relation" else None,
            background=list(BACKGROUNDS)[ground - 1] if ground else None,
            size=layout.size,
        )

    def tone(self, number: int) -> str:
        """The skin tone of the plan's first icon, or ""."""
        return ("", *SKIN_TONES)[self.icon_tones[self.icons[number, 0]]]

    def keys(self) -> np.ndarray:
        """int64 [P], equal for plans of the same meaning: of which one caption, without a style word, is true."""
        meant = [(of.count, of.relation if of.kind == "relation" else None, of.size) for of in LAYOUTS]
        meaning = np.array([meant.index(facts) for facts in meant])[self.layouts]
        concepts = np.append(self.icon_concepts, NO_ICON)[np.minimum(self.icons, len(self.icon_concepts))].astype(np.int64)
        pair = np.array([of.kind == "pair" for of in LAYOUTS])[self.layouts]
        concepts[pair] = np.sort(concepts[pair], axis=1)
        key = self.icon_tones[self.icons[:, 0]].astype(np.int64)
        for bits, digit in ((16, concepts[:, 0]), (16, concepts[:, 1]), (8, meaning), (8, self.colours), (8, self.grounds)):
            key = (key << bits) + digit
        return key

    def used_tokens(self) -> np.ndarray:
        """The tokens that occur, ascending: the rows of a token embedding that training from the bank reads."""
        return np.unique(np.concatenate([self.tokens, self.empty, [self.facts["pad"]]]))

    def save(self, path: Path) -> None:
        """Write the bank as a .npz file; equal banks give equal bytes."""
        arrays = vars(self) | {"facts": np.frombuffer(json.dumps(self.facts | {"format": FORMAT}).encode(), np.uint8)}
        arrays["captions"] = _since_first(self.captions)
        write_beside(path, lambda partial: _write(partial, arrays))

    @classmethod
    def load(cls, path: str | Path) -> "PlanBank":
        """Read what `save` wrote. Raises ConfigError, naming the file, where there is none or it is no bank."""
        try:
            with np.load(path, allow_pickle=False) as packed:
                arrays = {field.name: packed[field.name] for field in fields(cls)}
            facts = json.loads(arrays["facts"].tobytes())
            found = facts.pop("format")
        except FileNotFoundError:
            raise ConfigError(f"no plan bank at {path}; `unclip data bank` makes one") from None
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            raise ConfigError(f"{path} is no plan bank, or damaged; `unclip data bank` makes one") from None
        if found != FORMAT:
            raise ConfigError(f"{path} is a plan bank of format {found}, not {FORMAT}; make it again with `unclip data bank`")
        return cls(**arrays | {"facts": facts, "captions": _from_since_first(arrays["captions"])})


def _since_first(captions: np.ndarray) -> np.ndarray:
    """Numbers in the order of their first use: 0 for a first use, else 1 + the number. Most captions are used once."""
    first = np.diff(np.maximum.accumulate(captions), prepend=-1) > 0
    return np.where(first, 0, captions + 1).astype(np.int32)


def _from_since_first(packed: np.ndarray) -> np.ndarray:
    first = packed == 0
    return np.where(first, np.cumsum(first) - 1, packed - 1).astype(np.int32)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date
            entry.compress_type = zipfile.ZIP_LZMA
            with packed.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Names the tokens that a tokenizer makes of texts."""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def sprites_fingerprint(sprites: np.ndarray) -> str:
    """Names the drawings [N, S, S, 4] that a bank's rows stand for."""
    return hashlib.sha256(np.ascontiguousarray(sprites)).hexdigest()[:16]
