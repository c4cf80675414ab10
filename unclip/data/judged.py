"""What the evaluation's judge is trained and tried on: every scene with captions that are true, and wrong in one fact."""

# B pictures, T texts

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .distort import distort
from .render import BACKGROUNDS, COLOURS
from .scenes import KIND_WEIGHTS, NUMBERS, RELATIONS, IconSet, Plan, SceneSampler, style_phrase, wordings
from .sources import STYLES

KINDS = ("colour", "count", "relation", "pair", "background")
FACTS = 5  # of a text or picture: key, style (-1: none said), kind, first and second concept (-1: none)
STYLED = 0.3


class JudgedScenes(Dataset):
    """Endless scenes of every concept, held out or not, each with a true caption and `wrong` false ones.

    A share `singles` shows one icon, every concept and style alike often; the rest are `kinds` of composition. Items:
    `index`; `image` uint8 [3, 64, 64]; `captions`, the true one first, a line each; `facts` int64 [1 + wrong, FACTS];
    `style` of the picture; `random` float32 [16].
    """

    def __init__(self, path: str, seed: int = 0, singles: float = 0.5, wrong: int = 3):
        if not 0 <= singles <= 1 or wrong < 1:
            raise ValueError(f"singles must be in [0, 1] and wrong at least 1, got {singles} and {wrong}")
        self.icons = IconSet.load(path)
        self.seed, self.singles, self.wrong = seed, singles, wrong
        self.sampler = SceneSampler(self.icons, "all", seed, kinds=KINDS, tones=0.0)
        self.numbers = {c: n for n, c in enumerate(self.icons.concepts)}
        self.known = set(self.icons.recognisable)
        self.like: dict[str, list[str]] = {}
        for concept in self.icons.recognisable:
            self.like.setdefault(self.icons.groups[concept], []).append(concept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 5, index])
        plan = self._single(rng) if rng.random() < self.singles else self._composed(index)
        image = torch.from_numpy(self.icons.pixels(self.sampler.lay_out(plan, rng))).permute(2, 0, 1).contiguous()
        said = [(plan, plan.style if rng.random() < STYLED else None)]
        said += [self._wrong(plan, said[0][1], rng) for _ in range(self.wrong)]
        wording = int(rng.integers(100))
        return {
            "index": index,
            "image": image,
            "captions": "\n".join(caption(p, style, wording) for p, style in said),
            "facts": torch.tensor([self.facts(p, style) for p, style in said]),
            "style": STYLES.index(plan.style),
            "random": torch.from_numpy(rng.random(16, dtype=np.float32)),
        }

    def facts(self, plan: Plan, style: str | None) -> list[int]:
        """What a text states, as FACTS numbers."""
        concepts = [self.numbers[c] for c in plan.concepts]
        concepts = sorted(concepts) if plan.kind in ("pair", "relation") else [*concepts, -1]
        kind = list(KIND_WEIGHTS).index(plan.kind)
        return [zlib.crc32(plan.key.encode()), -1 if style is None else STYLES.index(style), kind, *concepts]

    def _single(self, rng: np.random.Generator) -> Plan:
        concept = _one(rng, self.icons.recognisable)
        return Plan("single", (concept,), _one(rng, list(self.icons.by_concept[concept])))

    def _composed(self, index: int) -> Plan:
        tries = (self.sampler.plan(index * 64 + n) for n in range(64))
        plan = next(p for p in tries if self.known.issuperset(p.concepts))
        return replace(plan, relation="above") if plan.relation == "on top" else plan

    def _wrong(self, plan: Plan, style: str | None, rng: np.random.Generator) -> tuple[Plan, str | None]:
        """A plan and style that the picture does not show: one fact changed, now the object, now what is said of it."""
        if style is not None and rng.random() < 0.25:
            return plan, _one(rng, [s for s in STYLES if s != style])
        changes = changed(plan)
        if changes and rng.random() < 0.5:
            return _one(rng, changes), style
        place = int(rng.integers(len(plan.concepts)))
        old = plan.concepts[place]
        others = [c for c in self.like[self.icons.groups[old]] if c not in plan.concepts]
        others = others or [c for c in self.icons.recognisable if c not in plan.concepts]
        return replace(plan, concepts=tuple(_one(rng, others) if n == place else c for n, c in enumerate(plan.concepts))), style


def changed(plan: Plan) -> list[Plan]:
    """A composition with what it says of its objects changed, in every way: colour, number, place, ground."""
    if plan.colour:
        return [replace(plan, colour=c) for c in COLOURS if c != plan.colour]
    if plan.count > 1:
        return [replace(plan, count=n) for n in NUMBERS if n != plan.count]
    if plan.background:
        return [replace(plan, background=b) for b in BACKGROUNDS if b != plan.background]
    if plan.relation:
        return [replace(plan, relation=r) for r in RELATIONS if r not in (plan.relation, "on top")]
    return []


def caption(plan: Plan, style: str | None = None, wording: int = 0) -> str:
    """One of the plan's wordings, the plainest by default, with the style if one is given."""
    options = wordings(plan)
    text = options[wording % len(options)]
    return text if style is None else f"{text} in {style_phrase(style)}"


def compare(shown: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
    """Of pictures' facts [B, FACTS] and texts' [T, FACTS]: which texts are true, and which true but vaguer; bool [B, T]."""
    single, pair, relation = (list(KIND_WEIGHTS).index(k) for k in ("single", "pair", "relation"))
    picture, text = shown[:, None], said[None]  # [B, 1, FACTS], [1, T, FACTS]
    style = (text[..., 1] < 0) | (text[..., 1] == picture[..., 1])
    true = (picture[..., 0] == text[..., 0]) & style
    named = (text[..., 2] == single) & ((text[..., 3] == picture[..., 3]) | (text[..., 3] == picture[..., 4]))
    both = (text[..., 3:] == picture[..., 3:]).all(-1) & (text[..., 2] != picture[..., 2])
    two = ((text[..., 2] == pair) & (picture[..., 2] == relation)) | ((text[..., 2] == relation) & (picture[..., 2] == pair))
    return true, ((named & (picture[..., 2] != single)) | (both & two)) & ~true


def renders(icons: IconSet, count: int | None = None, seed: int = 0) -> list[int]:
    """Rows of recognisable icons without a skin tone, in every style; `count` of them, spread evenly, or all."""
    rows = [r for c in icons.recognisable for rows in icons.by_concept[c].values() for r in rows[:1]]
    return np.random.default_rng([seed, 6]).permutation(rows)[:count].tolist()


def damaged(icons: IconSet, rows: list[int], kind: str | None, seed: int) -> Tensor:
    """Icons on white at 64 px, uint8 [N, 3, 64, 64], with a distortion of that kind, or none."""
    sampler = SceneSampler(icons, "all", seed, tones=0.0)
    pictures = []
    for row in rows:
        rng = np.random.default_rng([seed, 7, row])
        icon = icons.icons[row]
        picture = icons.pixels(sampler.lay_out(Plan("single", (icon["concept"],), icon["style"]), rng))
        pictures.append(picture if kind is None else distort(picture, kind, rng))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _one(rng: np.random.Generator, options: list) -> Any:
    return options[int(rng.integers(len(options)))]
