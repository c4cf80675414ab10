"""Training and test data of the evaluation's judge: scenes with a true caption and captions that are wrong in one fact."""

# B images, T texts

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .distort import distort
from .icon_packages import STYLES
from .render import BACKGROUNDS, COLOURS
from .scenes import KIND_WEIGHTS, NUMBERS, RELATIONS, IconSet, Plan, SceneSampler, style_phrase, wordings
from .sentences import choose

KINDS = ("colour", "count", "relation", "pair", "background")
FACTS = 5  # of a text or image: key, style (-1: not stated), kind, first and second concept (-1: none)
STYLE_SHARE = 0.3  # of captions that name the style


class JudgedScenes(Dataset):
    """Endless scenes of every concept, held out or not, each with a true caption and `wrong` false ones.

    A share `singles` shows one icon, every concept and style alike often; the rest are `kinds` of composition. Items:
    `index`; `image` uint8 [3, 64, 64]; `captions`, the true one first, a line each; `facts` int64 [1 + wrong, FACTS];
    `style` of the image; `random` float32 [16].
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
        texts = [(plan, plan.style if rng.random() < STYLE_SHARE else None)]
        texts += [self._wrong(plan, texts[0][1], rng) for _ in range(self.wrong)]
        wording = int(rng.integers(100))
        return {
            "index": index,
            "image": image,
            "captions": "\n".join(caption(p, style, wording) for p, style in texts),
            "facts": torch.tensor([self.facts(p, style) for p, style in texts]),
            "style": STYLES.index(plan.style),
            "random": torch.from_numpy(rng.random(16, dtype=np.float32)),
        }

    def facts(self, plan: Plan, style: str | None) -> list[int]:
        """The facts that a text states, as FACTS numbers."""
        concepts = [self.numbers[c] for c in plan.concepts]
        concepts = sorted(concepts) if plan.kind in ("pair", "relation") else [*concepts, -1]
        kind = list(KIND_WEIGHTS).index(plan.kind)
        return [zlib.crc32(plan.key.encode()), -1 if style is None else STYLES.index(style), kind, *concepts]

    def _single(self, rng: np.random.Generator) -> Plan:
        concept = choose(rng, self.icons.recognisable)
        return Plan("single", (concept,), choose(rng, list(self.icons.by_concept[concept])))

    def _composed(self, index: int) -> Plan:
        tries = (self.sampler.plan(index * 64 + n) for n in range(64))
        plan = next(p for p in tries if self.known.issuperset(p.concepts))
        return replace(plan, relation="above") if plan.relation == "on top" else plan

    def _wrong(self, plan: Plan, style: str | None, rng: np.random.Generator) -> tuple[Plan, str | None]:
        """A plan and style that the image does not show: one fact changed, either an object or an attribute."""
        if style is not None and rng.random() < 0.25:
            return plan, choose(rng, [s for s in STYLES if s != style])
        changes = attribute_changes(plan)
        if changes and rng.random() < 0.5:
            return choose(rng, changes), style
        place = int(rng.integers(len(plan.concepts)))
        old = plan.concepts[place]
        others = [c for c in self.like[self.icons.groups[old]] if c not in plan.concepts]
        others = others or [c for c in self.icons.recognisable if c not in plan.concepts]
        return replace(
            plan, concepts=tuple(choose(rng, others) if n == place else c for n, c in enumerate(plan.concepts))
        ), style


def attribute_changes(plan: Plan) -> list[Plan]:
    """All plans with another value of the plan's attribute: colour, number, place or background."""
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


def compare(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Which texts are true of each image, and which are true but less specific, bool [B, T] each.

    `images` [B, FACTS] and `texts` [T, FACTS] hold facts.
    """
    single, pair, relation = (list(KIND_WEIGHTS).index(k) for k in ("single", "pair", "relation"))
    image, text = images[:, None], texts[None]  # [B, 1, FACTS], [1, T, FACTS]
    style = (text[..., 1] < 0) | (text[..., 1] == image[..., 1])
    true = (image[..., 0] == text[..., 0]) & style
    named = (text[..., 2] == single) & ((text[..., 3] == image[..., 3]) | (text[..., 3] == image[..., 4]))
    both = (text[..., 3:] == image[..., 3:]).all(-1) & (text[..., 2] != image[..., 2])
    two = ((text[..., 2] == pair) & (image[..., 2] == relation)) | ((text[..., 2] == relation) & (image[..., 2] == pair))
    return true, ((named & (image[..., 2] != single)) | (both & two)) & ~true


def icon_rows(icons: IconSet, count: int | None = None, seed: int = 0) -> list[int]:
    """Rows of recognisable icons without a skin tone, in every style; `count` of them, spread evenly, or all."""
    rows = [r for c in icons.recognisable for rows in icons.by_concept[c].values() for r in rows[:1]]
    return np.random.default_rng([seed, 6]).permutation(rows)[:count].tolist()


def distorted_icons(icons: IconSet, rows: list[int], kind: str | None, seed: int) -> Tensor:
    """Icons on white at 64 px, uint8 [N, 3, 64, 64], with a distortion of that kind, or none."""
    sampler = SceneSampler(icons, "all", seed, tones=0.0)
    images = []
    for row in rows:
        rng = np.random.default_rng([seed, 7, row])
        icon = icons.icons[row]
        image = icons.pixels(sampler.lay_out(Plan("single", (icon["concept"],), icon["style"]), rng))
        images.append(image if kind is None else distort(image, kind, rng))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
