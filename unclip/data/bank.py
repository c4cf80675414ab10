"""Banks of plans: the layouts and tokenised captions of up to millions of scenes, precomputed in one file.

A training step that makes its batch from a bank (`BankScenes`) processes no text and reads no image on the host. Reading a
bank needs neither the dataset that it was made from nor the libraries that write captions.
"""

import hashlib
import json
import lzma
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..io.checkpoints import write_beside
from ..runtime.config import ConfigError
from .icon_packages import SKIN_TONES, STYLES
from .layouts import LAYOUTS
from .plans import Plan
from .render import BACKGROUNDS, COLOURS, GROUNDS

FORMAT = 1
CONCEPTS = 3  # most concepts of one plan
NO_ICON, NO_CONCEPT = 2**16 - 1, 2**8 - 1
ATTACHED = 2**8 - 1  # in place of the number of a layout
PLACE_UNIT = 2**-13  # of `places`
NAMED, NAMES_STYLE = 0b011, 0b100  # of a caption's flags: how many of the things it names, and whether it names the style
ALL_GROUNDS = BACKGROUNDS | GROUNDS


@dataclass
class PlanBank:
    """P plans, of which A are attachments; U distinct captions of T tokens in all; N icons; M recoloured icons.

    Attributes:
        facts: JSON-like; what the bank was made of (`data`, `split`, `seed`), the fingerprints of the `sprites` and of the
            `tokenizer`, its `length` and `pad` token, and the names of the `concepts` and of the `relations` of attachments.
        icons: uint16 [P, CONCEPTS], the rows of the concepts' icons, NO_ICON for none.
        layouts: uint8 [P], rows of `LAYOUTS`, or ATTACHED.
        colours: uint8 [P, CONCEPTS] that the caption names of each concept: 1 + the number in `COLOURS`, 0 for none.
        grounds: uint8 [P], 1 + the number in `ALL_GROUNDS`, 0 for white.
        relations: uint8 [A], numbers in facts["relations"].
        orders: uint8 [A, CONCEPTS], the concepts that the layers show, back to front; NO_CONCEPT for none.
        places: int16 [A, CONCEPTS, 3], x, y and size of each layer, times PLACE_UNIT, where what is drawn of all of them has
            the centre 0 and the longer side 1.
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
    relations: np.ndarray
    orders: np.ndarray
    places: np.ndarray
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

    def attachments(self) -> np.ndarray:
        """int64 [P], a plan's number among the attachments, -1 for no attachment."""
        attached = self.layouts == ATTACHED
        return np.where(attached, np.cumsum(attached) - 1, -1)

    def plans(self) -> list[Plan]:
        """The plans, as `SceneSampler` would give them."""
        return [self._plan(number, attachment) for number, attachment in enumerate(self.attachments().tolist())]

    def _plan(self, number: int, attachment: int) -> Plan:
        rows = [row for row in self.icons[number].tolist() if row != NO_ICON]
        concepts = tuple(self.facts["concepts"][self.icon_concepts[row]] for row in rows)
        colours = tuple(("", *COLOURS)[colour] for colour in self.colours[number, : len(rows)])
        layout = None if attachment >= 0 else LAYOUTS[self.layouts[number]]
        kind = layout.kind if layout else "attachment"
        relation = self.facts["relations"][self.relations[attachment]] if layout is None else layout.relation
        return Plan(
            kind,
            concepts,
            STYLES[self.icon_styles[rows[0]]],
            colour=colours[0] if kind == "colour" else None,
            count=layout.count if layout and kind == "count" else 1,
            relation=relation if kind != "pair" else None,
            background=(None, *ALL_GROUNDS)[self.grounds[number]],
            size=layout.size if layout else None,
            colours=colours if any(colours) and kind != "colour" else (),
        )

    def tones(self) -> list[str]:
        """The skin tones of the plans' first icons, "" for none."""
        return [("", *SKIN_TONES)[tone] for tone in self.icon_tones[self.icons[:, 0]]]

    def keys(self) -> np.ndarray:
        """int64 [P], equal for plans of the same meaning: of which one caption, without a style word, is true."""
        descriptions = [
            (of.kind in ("three", "ground"), of.count, of.kind != "pair" and of.relation, of.size) for of in LAYOUTS
        ]
        meanings = np.append([descriptions.index(facts) for facts in descriptions], len(LAYOUTS))[
            np.minimum(self.layouts, len(LAYOUTS))
        ]
        meanings[self.layouts == ATTACHED] += self.relations
        concepts = np.append(self.icon_concepts, NO_ICON)[np.minimum(self.icons, len(self.icon_concepts))].astype(np.int64)
        alike = np.array([of.kind == "pair" or of.concepts == (0, 1, 2) for of in LAYOUTS] + [False])
        any_order = alike[np.minimum(self.layouts, len(LAYOUTS))]
        concepts[any_order] = np.sort(concepts[any_order], axis=1)
        facts = (*concepts.T, self.icon_tones[self.icons[:, 0]], meanings, *self.colours.T, self.grounds)
        return _hash_rows(facts)

    def used_tokens(self) -> np.ndarray:
        """The tokens that occur, ascending: the rows of a token embedding that training from the bank reads."""
        return np.unique(np.concatenate([self.tokens, self.empty, [self.facts["pad"]]]))

    def save(self, path: Path) -> None:
        """Write the bank as a .npz file; equal banks give equal bytes."""
        arrays = vars(self) | {"facts": np.frombuffer(json.dumps(self.facts | {"format": FORMAT}).encode(), np.uint8)}
        arrays["captions"] = _encode_first_uses(self.captions)
        write_beside(path, lambda partial: _write(partial, arrays))

    @classmethod
    def load(cls, path: str | Path) -> "PlanBank":
        """Read what `save` wrote. Raises ConfigError, naming the file, where there is none or it is no bank."""
        try:
            with np.load(path, allow_pickle=False) as packed:
                facts = json.loads(packed["facts"].tobytes())
                if (found := facts.pop("format")) != FORMAT:
                    raise ConfigError(
                        f"{path} is a bank of format {found}, not {FORMAT}; make it again with `unclip data bank`"
                    )
                arrays = {field.name: packed[field.name] for field in fields(cls)}
        except ConfigError:
            raise
        except FileNotFoundError:
            raise ConfigError(f"no plan bank at {path}; `unclip data bank` makes one") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, lzma.LZMAError):
            raise ConfigError(f"{path} is no plan bank, or damaged; `unclip data bank` makes one") from None
        return cls(**arrays | {"facts": facts, "captions": _decode_first_uses(arrays["captions"])})


def _hash_rows(digits: tuple[np.ndarray, ...]) -> np.ndarray:
    """int64 hashes of rows of integers (the mixing steps of SplitMix64)."""
    key = np.zeros(len(digits[0]), np.uint64)
    for digit in digits:
        key = (key ^ digit.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(31)
    return key.view(np.int64)


def _encode_first_uses(captions: np.ndarray) -> np.ndarray:
    """Numbers in the order of their first use: 0 for a first use, else 1 + the number. Most captions are used once."""
    first = np.diff(np.maximum.accumulate(captions), prepend=-1) > 0
    return np.where(first, 0, captions + 1).astype(np.int32)


def _decode_first_uses(packed: np.ndarray) -> np.ndarray:
    first = packed == 0
    return np.where(first, np.cumsum(first) - 1, packed - 1).astype(np.int32)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date
            entry.compress_type = zipfile.ZIP_LZMA
            with packed.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and length: equal if it gives equal tokens."""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def sprites_fingerprint(sprites: np.ndarray) -> str:
    """A hash of the sprites [N, S, S, 4] that a bank's rows refer to."""
    return hashlib.sha256(np.ascontiguousarray(sprites).data).hexdigest()[:16]
