"""Making a bank of plans from the scenes of a dataset."""

from collections.abc import Callable, Iterable
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from ..config import ConfigError
from .bank import NAMES_STYLE, NO_ICON, PlanBank, sprites_fingerprint, tokenizer_fingerprint
from .captions import mentions_style, name_spans
from .emoji import SKIN_TONES, STYLES
from .examples import EmojiScenes, captioned_examples
from .icons import IconSet
from .layouts import layout_of
from .render import BACKGROUNDS, COLOURS
from .scenes import SceneSampler

_CHUNK = 2000  # plans that a process makes before it hands them over


class _Caption(NamedTuple):
    text: str
    spans: tuple[tuple[int, int], ...]  # of characters
    names_style: bool


class _Planned(NamedTuple):
    """What a bank keeps of one scene."""

    icons: tuple[int, int]
    layout: int
    colour: int
    ground: int
    caption: _Caption
    matrix: tuple[float, ...] | None


def build_bank(
    data: dict,
    tokenizer: Any,
    count: int,
    split: str = "train",
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda chunks, total: chunks,
) -> PlanBank:
    """The first `count` scenes that training with the section `data` and `seed` would see, as a bank.

    The same arguments give the same bank, with any number of processes. `progress(chunks, total)` wraps what is iterated.
    Raises ConfigError where `data` names no emoji scenes, and ValueError for a `count` below 1 or a tokenizer with more than
    65,536 tokens.
    """
    if count < 1:
        raise ValueError(f"a bank holds at least 1 plan, got {count}")
    examples = captioned_examples(data, split, seed)
    if not isinstance(examples, EmojiScenes):
        raise ConfigError(f"data.path {data['path']} holds no emoji scenes, of which a bank of plans is made")
    starts = range(0, count, _CHUNK)
    chunks = [(start, min(start + _CHUNK, count)) for start in starts]
    packer = _Packer(count)
    if processes > 1:
        with get_context("spawn").Pool(processes, _begin, (data, split, seed)) as pool:
            for planned in progress(pool.imap(_chunk, chunks), len(chunks)):
                packer.add(planned)
    else:
        for start, stop in progress(chunks, len(chunks)):
            packer.add([_planned(examples.sampler, index) for index in range(start, stop)])
    tokens = _tokens(tokenizer, list(packer.captions))
    made_of = {"data": data, "split": split, "seed": seed, "sprites": sprites_fingerprint(examples.icons.sprites)}
    facts = made_of | {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "length": tokenizer.model_max_length,
        "pad": tokenizer.pad_token_id,
        "concepts": examples.icons.concepts,
    }
    return PlanBank(facts=facts, **packer.arrays(), **tokens, **_icon_facts(examples.icons))


_SAMPLER: SceneSampler  # of a process of the pool


def _begin(data: dict, split: str, seed: int) -> None:
    global _SAMPLER
    _SAMPLER = captioned_examples(data, split, seed).sampler


def _chunk(bounds: tuple[int, int]) -> list[_Planned]:
    return [_planned(_SAMPLER, index) for index in range(*bounds)]


def _planned(sampler: SceneSampler, index: int) -> _Planned:
    plan, rng = sampler.planned(index)
    scene = sampler.lay_out(plan, rng)
    rows = [layer.icon for layer in scene.layers]
    matrix = scene.layers[0].matrix
    spans = name_spans(scene.caption, scene.names) if matrix is None else ()  # recoloured, it is no longer what the icon is
    return _Planned(
        (rows[0], rows[1] if len(plan.concepts) == 2 else NO_ICON),
        layout_of(plan, scene.layers[0].x < scene.layers[-1].x),
        1 + list(COLOURS).index(plan.colour) if plan.colour else 0,
        1 + list(BACKGROUNDS).index(plan.background) if plan.background else 0,
        _Caption(scene.caption, spans, mentions_style(scene)),
        matrix,
    )


class _Packer:
    """Collects the plans of a bank in order."""

    def __init__(self, count: int):
        self.icons = np.empty((count, 2), np.uint16)
        self.layouts, self.colours, self.grounds = np.empty((3, count), np.uint8)
        self.numbers = np.empty(count, np.int32)
        self.captions: dict[_Caption, int] = {}
        self.matrices: dict[int, tuple[float, ...]] = {}
        self.filled = 0

    def add(self, planned: list[_Planned]) -> None:
        for plan in planned:
            at = self.filled
            self.icons[at], self.layouts[at], self.colours[at], self.grounds[at] = plan[:4]
            self.numbers[at] = self.captions.setdefault(plan.caption, len(self.captions))
            if plan.matrix is not None:
                self.matrices[plan.icons[0] * 8 + plan.colour] = plan.matrix
            self.filled += 1

    def arrays(self) -> dict[str, np.ndarray]:
        turned = sorted(self.matrices)
        matrices = np.array([self.matrices[n] for n in turned], np.float32).reshape(-1, 9)
        kept = {"icons": self.icons, "layouts": self.layouts, "colours": self.colours, "grounds": self.grounds}
        return kept | {"captions": self.numbers, "turned": np.array(turned, np.uint32), "matrices": matrices}


def _tokens(tokenizer: Any, captions: list[_Caption]) -> dict[str, np.ndarray]:
    """`tokens`, `lengths`, `spans`, `flags` and `empty` of a bank."""
    if len(tokenizer) > 2**16:
        raise ValueError(f"a bank keeps tokens in 16 bits; the tokenizer has {len(tokenizer)}")
    longest = {"truncation": True, "max_length": tokenizer.model_max_length}
    tokens, lengths = [], np.empty(len(captions), np.uint8)
    spans, flags = np.zeros((len(captions), 4), np.uint8), np.empty(len(captions), np.uint8)
    for start in range(0, len(captions), 4096):
        some = captions[start : start + 4096]
        encoded = tokenizer([caption.text for caption in some], **longest)
        for row, caption in enumerate(some):
            at = start + row
            tokens += encoded.input_ids[row]
            lengths[at] = len(encoded.input_ids[row])
            flags[at] = len(caption.spans) + NAMES_STYLE * caption.names_style
            for number, span in enumerate(caption.spans):
                spans[at, 2 * number : 2 * number + 2] = _token_span(encoded, row, span)
    empty = np.array(tokenizer("", **longest).input_ids, np.uint16)
    return {"tokens": np.array(tokens, np.uint16), "lengths": lengths, "spans": spans, "flags": flags, "empty": empty}


def _token_span(encoded: Any, row: int, span: tuple[int, int]) -> tuple[int, int]:
    """First token and the one past the last of the characters `span`; 0, 0 where the caption is cut before it."""
    found = [token for at in range(*span) if (token := encoded.char_to_token(row, at)) is not None]
    return (found[0], found[-1] + 1) if found else (0, 0)


def _icon_facts(icons: IconSet) -> dict[str, np.ndarray]:
    number = {concept: n for n, concept in enumerate(icons.concepts)}
    tones = ("", *SKIN_TONES)
    return {
        "icon_concepts": np.array([number[icon["concept"]] for icon in icons.icons], np.uint16),
        "icon_styles": np.array([STYLES.index(icon["style"]) for icon in icons.icons], np.uint8),
        "icon_tones": np.array([tones.index(icon["tone"]) for icon in icons.icons], np.uint8),
    }
