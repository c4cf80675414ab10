"""Training batches of scenes from a bank of plans, made on the device that trains."""

# B scenes, L layers of each, N text tokens, P plans, U captions

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..runtime.random import Stream, integers, scalars, uniform
from .bank import NAMED, NAMES_STYLE, NO_ICON, PlanBank, sprites_fingerprint
from .compositor import Layers, compose
from .emoji import SPRITE_SIZE
from .layouts import GROUND_SHIFT, LARGE, LARGE_SHIFT, LAYOUTS, PLACES, POSE_SIZE, SHIFT, SHRINK
from .render import BACKGROUNDS, WHITE

_LENGTHS = 4  # texts are padded to a multiple of this


class BankScenes(nn.Module):
    """Endless scenes from a `bank` of plans and the `sprites` [N, 64, 64, 4] that it was made with.

    Example `index` shows plan `index` modulo their number, in a place, size and ground of its own: those of counter-based
    random numbers of (`seed`, index), in the ranges of `SceneSampler.lay_out`. So a batch is a function of its indices, on any
    device and in any split. Nothing is read back to the host, and `torch.compile` takes it whole. With `single_pose` single
    icons have one size and place; None is what the bank's data section says.

    Raises ConfigError where the bank was made with other sprites.
    """

    def __init__(self, bank: PlanBank, sprites: np.ndarray, seed: int = 0, single_pose: bool | None = None):
        super().__init__()
        if (made_with := bank.facts["sprites"]) != (found := sprites_fingerprint(sprites)):
            raise ConfigError(f"the plan bank was made with the sprites {made_with}, but these are {found}; make it again")
        self.seed, self.size = seed, SPRITE_SIZE
        self.single_pose = bool(bank.facts["data"].get("single_pose")) if single_pose is None else single_pose
        self.length = -(-max(int(bank.lengths.max()), len(bank.empty)) // _LENGTHS) * _LENGTHS
        pad = bank.facts["pad"]
        empty = np.pad(bank.empty, (0, self.length - len(bank.empty)), constant_values=pad)
        self._keep(
            atlas=sprites if sprites.flags.writeable else np.array(sprites),
            empty_tokens=empty.astype(np.int64),
            empty_mask=np.arange(self.length) < len(bank.empty),
            plans=_plan_table(bank),
            keys=bank.keys(),
            captions=_caption_table(bank),
            all_tokens=np.pad(bank.tokens.astype(np.int32), (0, self.length), constant_values=pad),
            styles=bank.icon_styles.astype(np.int64),
            matrices=np.concatenate([np.eye(3, dtype=np.float32)[None], bank.matrices.reshape(-1, 3, 3)]),
            grounds=np.array([WHITE, *BACKGROUNDS.values()]),
            **_layout_tables(max(len(LAYOUTS[n].spots) for n in np.unique(bank.layouts)), self.single_pose),
        )
        self.pad, self.has_colours = pad, len(bank.matrices) > 0

    def _keep(self, **tables: np.ndarray) -> None:
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The examples `indices` [B], made on `device`, to which the tables move first; None is where they are."""
        if device is not None:
            self.to(device)
        indices = torch.as_tensor(indices)
        if self.atlas.is_cuda and not indices.is_cuda:
            indices = indices.pin_memory()
        return self(indices.to(self.atlas.device, non_blocking=True))

    @torch.no_grad()
    def forward(self, indices: Tensor) -> dict[str, Tensor]:
        """The examples `indices` [B] int64, on their device.

        As a collated batch of `EmojiScenes`, with `tokens` int64 [B, N] and their `mask` bool [B, N] in place of `caption`,
        and with `names` int8 [B, N], which says of each token whether it spells the first name (1), the second (-1) or
        neither (0), in place of `spans`.
        """
        plans = indices % len(self.plans)
        icon, other, layout, matrix, ground, caption = self.plans[plans].long().unbind(1)
        icons, random = torch.stack([icon, other], 1), scalars(self.seed, indices)
        layers = self._layers(indices, random, icons, layout, matrix)
        text, named, names_style = self._text(caption)
        style = self.styles[icon]
        return {
            "index": indices,
            "image": compose(self.atlas, layers, self._background(indices, ground), self.size),
            **text,
            "key": self.keys[plans],
            "style": style,
            "caption_style": torch.where(names_style, style, -1),
            "icon": torch.where(self.is_single[layout], icon, -1),
            "random": random,
            "rows": torch.where(torch.arange(2, device=named.device) < named[:, None], icons, -1),
            "sides": _sides(layers) * (named == 2)[:, None, None],
        }

    def empty(self, count: int) -> tuple[Tensor, Tensor]:
        """`tokens` and `mask` [count, N] of the empty caption, for examples whose text is dropped."""
        return self.empty_tokens.expand(count, -1), self.empty_mask.expand(count, -1)

    @torch.no_grad()
    def single_images(self, icons: Tensor) -> Tensor:
        """uint8 [B, 3, 64, 64]: the icons [B] alone, as all single icons are drawn where they have one pose."""
        half = torch.full((len(icons), 1), 0.5, device=icons.device)
        layers = Layers(icons[:, None], half, half, torch.full_like(half, POSE_SIZE))
        return compose(self.atlas, layers, self.grounds[:1].expand(len(icons), -1), self.size)

    def _layers(self, indices: Tensor, random: Tensor, icons: Tensor, layout: Tensor, matrix: Tensor) -> Layers:
        """The layers [B, L] of scenes of one concept or two, `icons` [B, 2], by the examples' `scalars`."""
        spots, numbers = self.spots[layout], self.concepts[layout]  # [B, L, 3], [B, L]
        growth, least, shift = self.ranges[layout].unbind(1)  # [B] each
        count = numbers.shape[1]
        places = uniform(self.seed, Stream.SCENE_PLACE, indices, count, 2) * 2 - 1  # [B, L, 2]
        size = spots[..., 2] + (growth * random[:, Stream.SCENE_SIZE])[:, None]  # [B, L]
        moved = shift[:, None] * torch.where(size < LARGE, 1.0, LARGE_SHIFT)
        x, y = (spots[..., :2] + moved[..., None] * places).unbind(2)
        shrunk = size * (least + (1 - least) * random[:, Stream.SCENE_SHRINK])[:, None]
        icons = torch.where(numbers < 0, -1, icons.gather(1, numbers.clamp_min(0)))
        matrices = self.matrices[matrix][:, None].expand(-1, count, -1, -1) if self.has_colours else None
        return Layers(icons, x, y, shrunk, matrices)

    def _background(self, indices: Tensor, ground: Tensor) -> Tensor:
        """Colours [B, 3] from 0 to 255."""
        shift = integers(self.seed, Stream.SCENE_BACKGROUND, indices, 3, below=2 * GROUND_SHIFT + 1) - GROUND_SHIFT
        return (self.grounds[ground] + shift * (ground > 0)[:, None]).clamp(0, 255)

    def _text(self, caption: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`tokens`, `mask` and `names`; how many things are named [B], and whether the style is [B]."""
        start, length, first, after_first, second, after_second, flags = self.captions[caption].long()[..., None].unbind(1)
        at = torch.arange(self.length, device=caption.device)  # [N]
        mask = at < length  # [B, N]
        tokens = torch.where(mask, self.all_tokens[start + at].long(), self.pad)
        spelt = [((at >= begin) & (at < end)).to(torch.int8) for begin, end in ((first, after_first), (second, after_second))]
        text = {"tokens": tokens, "mask": mask, "names": spelt[0] - spelt[1]}
        return text, flags[:, 0] & NAMED, (flags[:, 0] & NAMES_STYLE) > 0


def _sides(layers: Layers) -> Tensor:
    """int8 [B, PLACES, PLACES]: 1 where only the first layer's square covers a place, -1 where only the second's does."""
    at = (torch.arange(PLACES, device=layers.x.device) + 0.5) / PLACES
    across, down = ((at - centre[:, :2, None]).abs() < layers.size[:, :2, None] / 2 for centre in (layers.x, layers.y))
    inside = (down[..., None] & across[..., None, :]).to(torch.int8)  # [B, 1 or 2, PLACES, PLACES]
    return inside[:, 0] - inside[:, -1]


def _plan_table(bank: PlanBank) -> np.ndarray:
    """int32 [P, 6]: icons of the first and of the second concept, layout, matrix (0 for none), ground, caption."""
    wanted = bank.icons[:, 0].astype(np.int64) * 8 + bank.colours
    at = np.minimum(np.searchsorted(bank.turned, wanted), max(len(bank.turned) - 1, 0))
    matrix = np.where(bank.turned[at] == wanted, at + 1, 0) if len(bank.turned) else np.zeros_like(wanted)
    other = np.where(bank.icons[:, 1] == NO_ICON, 0, bank.icons[:, 1])  # a number that may be looked up
    columns = (bank.icons[:, 0], other, bank.layouts, matrix, bank.grounds, bank.captions)
    return np.stack(columns, 1, dtype=np.int32, casting="unsafe")


def _caption_table(bank: PlanBank) -> np.ndarray:
    """int32 [U, 7]: start among all tokens, length, spans of both names, flags."""
    lengths = bank.lengths.astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    return np.concatenate([starts[:, None], lengths[:, None], bank.spans, bank.flags[:, None]], 1).astype(np.int32)


def _layout_tables(layers: int, single_pose: bool) -> dict[str, np.ndarray]:
    """Of all layouts, for at most `layers` layers.

    `spots` float32 [layouts, L, 3]; `concepts` int64 [layouts, L], the number of a layer's concept, -1 for no layer; `ranges`
    float32 [layouts, 3], how much a size grows, the least share of it that several things have, and the shift of centres;
    `is_single` bool [layouts].
    """
    spots = np.full((len(LAYOUTS), layers, 3), 0.5, np.float32)
    concepts = np.full((len(LAYOUTS), layers), -1)
    ranges = np.zeros((len(LAYOUTS), 3), np.float32)
    for number, layout in enumerate(LAYOUTS):
        count = min(len(layout.spots), layers)
        spots[number, :count], concepts[number, :count] = layout.spots[:count], np.arange(count) % layout.concepts
        alone = len(layout.spots) == 1
        ranges[number] = layout.growth, 1 if alone else SHRINK, SHIFT
        if alone and single_pose:
            spots[number, 0, 2] = POSE_SIZE if layout.growth else layout.spots[0][2]
            ranges[number] = 0, 1, 0
    is_single = np.array([layout.kind == "single" for layout in LAYOUTS])
    return {"spots": spots, "concepts": concepts, "ranges": ranges, "is_single": is_single}
