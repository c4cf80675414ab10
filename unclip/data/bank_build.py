"""Building a bank of plans from the scenes of a dataset."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from ..runtime.config import ConfigError
from .attachments import WEIGHTS
from .bank import (
    ALL_GROUNDS,
    ATTACHED,
    CONCEPTS,
    NAMES_STYLE,
    NO_CONCEPT,
    NO_ICON,
    PLACE_UNIT,
    PlanBank,
    sprites_fingerprint,
    tokenizer_fingerprint,
)
from .captions import concepts_of_layers, mentions_style, scene_spans
from .examples import EmojiScenes, captioned_examples
from .icon_packages import SKIN_TONES, STYLES
from .icons import IconSet
from .layouts import layout_of
from .plans import Scene
from .render import COLOURS
from .scenes import SceneSampler

_CHUNK = 2000  # plans that a process returns at a time
_RELATIONS = list(WEIGHTS)


class _Caption(NamedTuple):
    text: str
    spans: tuple[tuple[int, int], ...]  # of characters
    names_style: bool


class _Attachment(NamedTuple):
    relation: int
    order: list[int]
    places: np.ndarray


class _PackedScene(NamedTuple):
    """The entries of a bank for one scene."""

    icons: list[int]
    layout: int
    colours: list[int]
    ground: int
    caption: _Caption
    matrices: dict[int, tuple[float, ...]]  # by icon * 8 + colour
    attachment: _Attachment | None


def build_bank(
    data: dict,
    tokenizer: Any,
    count: int,
    stream: tuple[str, int] = ("train", 0),
    processes: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda chunks, total: chunks,
) -> PlanBank:
    """The first `count` scenes of the section `data`, for the `stream` of a split and a seed, as a bank.

    The same arguments give the same bank, with any number of processes. `progress(chunks, total)` wraps what is iterated.
    Raises ConfigError where `data` names no emoji scenes, ValueError for a `count` below 1 or a tokenizer with more than
    65,536 tokens, and RuntimeError when one of the processes dies.
    """
    split, seed = stream
    if count < 1:
        raise ValueError(f"a bank holds at least 1 plan, got {count}")
    examples = captioned_examples(data, split, seed)
    if not isinstance(examples, EmojiScenes):
        raise ConfigError(f"data.path {data['path']} holds no emoji scenes, from which a bank of plans is built")
    starts = range(0, count, _CHUNK)
    chunks = [(start, min(start + _CHUNK, count)) for start in starts]
    packer = _Packer(count)
    if processes > 1:
        try:
            with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (data, split, seed)) as pool:
                for packed in progress(pool.map(_pack_chunk, chunks), len(chunks)):
                    packer.add(packed)
        except BrokenProcessPool:
            raise RuntimeError("a process that makes plans has ended early, perhaps for lack of memory; try fewer") from None
    else:
        for start, stop in progress(chunks, len(chunks)):
            packer.add([_pack(examples.sampler, index) for index in range(start, stop)])
    tokens = _tokens(tokenizer, list(packer.captions))
    made_of = {"data": data, "split": split, "seed": seed, "sprites": sprites_fingerprint(examples.icons.sprites)}
    facts = made_of | {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "length": tokenizer.model_max_length,
        "pad": tokenizer.pad_token_id,
        "concepts": examples.icons.concepts,
        "relations": _RELATIONS,
    }
    return PlanBank(facts=facts, **packer.arrays(), **tokens, **_icon_facts(examples.icons))


_SAMPLER: SceneSampler  # of a process of the pool


def _start_worker(data: dict, split: str, seed: int) -> None:
    global _SAMPLER
    examples = captioned_examples(data, split, seed)
    assert isinstance(examples, EmojiScenes)  # as checked by build_bank
    _SAMPLER = examples.sampler


def _pack_chunk(bounds: tuple[int, int]) -> list[_PackedScene]:
    return [_pack(_SAMPLER, index) for index in range(*bounds)]


def _pack(sampler: SceneSampler, index: int) -> _PackedScene:
    plan, rng = sampler.planned(index)
    scene = sampler.lay_out(plan, rng)
    order = concepts_of_layers(scene)
    rows = [scene.layers[order.index(number)].icon for number in range(len(plan.concepts))]
    colours = [("", *COLOURS).index(colour) for colour in plan.colours or [plan.colour or ""]]
    matrices = {
        rows[number] * 8 + colours[number]: layer.matrix
        for number, layer in zip(order, scene.layers, strict=True)
        if layer.matrix is not None
    }
    attached = plan.kind == "attachment"
    return _PackedScene(
        _padded(rows, NO_ICON),
        ATTACHED if attached else layout_of(plan, scene.layers),
        _padded(colours, 0),
        (None, *ALL_GROUNDS).index(plan.background),
        _Caption(scene.caption, scene_spans(scene), mentions_style(scene)),
        matrices,
        _Attachment(_RELATIONS.index(plan.relation or ""), _padded(order, NO_CONCEPT), _places(scene, sampler))
        if attached
        else None,
    )


def _padded(numbers: Sequence[int], padding: int) -> list[int]:
    return [*numbers, *[padding] * (CONCEPTS - len(numbers))]


def _places(scene: Scene, sampler: SceneSampler) -> np.ndarray:
    """float [CONCEPTS, 3]: x, y and size of the layers, scaled so that their drawings together are centred at 0 and 1 long."""
    squares = np.array([(layer.x, layer.y, layer.size) for layer in scene.layers])
    extents = np.array([sampler.attachments.extent(layer.icon) for layer in scene.layers])  # left, top, right, bottom
    drawn = (squares[:, :2] - squares[:, 2:] / 2)[:, None] + squares[:, 2:, None] * extents.reshape(-1, 2, 2)
    low, high = drawn[:, 0].min(0), drawn[:, 1].max(0)
    places = np.zeros((CONCEPTS, 3))
    places[: len(squares), :2], places[: len(squares), 2] = squares[:, :2] - (low + high) / 2, squares[:, 2]
    return places / (high - low).max()


class _Packer:
    """Collects the scenes of a bank in order."""

    def __init__(self, count: int):
        self.icons = np.empty((count, CONCEPTS), np.uint16)
        self.colours = np.empty((count, CONCEPTS), np.uint8)
        self.layouts, self.grounds = np.empty((2, count), np.uint8)
        self.numbers = np.empty(count, np.int32)
        self.captions: dict[_Caption, int] = {}
        self.matrices: dict[int, tuple[float, ...]] = {}
        self.attachments: list[_Attachment] = []
        self.filled = 0

    def add(self, scenes: list[_PackedScene]) -> None:
        for scene in scenes:
            at = self.filled
            self.icons[at], self.layouts[at], self.colours[at], self.grounds[at] = scene[:4]
            self.numbers[at] = self.captions.setdefault(scene.caption, len(self.captions))
            self.matrices |= scene.matrices
            if scene.attachment is not None:
                self.attachments.append(scene.attachment)
            self.filled += 1

    def arrays(self) -> dict[str, np.ndarray]:
        turned = sorted(self.matrices)
        places = np.array([a.places for a in self.attachments]).reshape(-1, CONCEPTS, 3)
        return {
            "icons": self.icons,
            "layouts": self.layouts,
            "colours": self.colours,
            "grounds": self.grounds,
            "captions": self.numbers,
            "relations": np.array([a.relation for a in self.attachments], np.uint8),
            "orders": np.array([a.order for a in self.attachments], np.uint8).reshape(-1, CONCEPTS),
            "places": (places / PLACE_UNIT).round().clip(-(2**15), 2**15 - 1).astype(np.int16),
            "turned": np.array(turned, np.uint32),
            "matrices": np.array([self.matrices[n] for n in turned], np.float32).reshape(-1, 9),
        }


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
    """First token and the one past the last of the characters `span`; 0, 0 if truncation removed them."""
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
