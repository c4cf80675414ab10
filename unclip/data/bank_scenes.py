"""Training batches of scenes from a bank of plans, composed on the training device."""

# B scenes, L layers of each, C concepts of each, N text tokens, P plans, U captions

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.layout import POSE_SIZE

from ..runtime.config import ConfigError
from ..runtime.random import Stream, integers, scalars, uniform
from .bank import (
    ALL_GROUNDS,
    ATTACHED,
    NAMED,
    NAMES_STYLE,
    NO_CONCEPT,
    NO_ICON,
    PLACE_UNIT,
    PlanBank,
    sprites_fingerprint,
)
from .compositor import Layers, compose
from .icon_packages import SPRITE_SIZE
from .layouts import (
    FIT_SHIFT,
    FIT_SIZES,
    GROUND_SHIFT,
    LARGE,
    LARGE_SHIFT,
    LAYOUTS,
    MAX_LAYERS,
    PLACES,
    SHIFT,
)
from .render import WHITE

_LENGTHS = 4  # texts are padded to a multiple of this


class BankScenes(nn.Module):
    """Endless scenes from a `bank` of plans and the `sprites` [N, 64, 64, 4] that it was made with.

    Example `index` shows plan `index` modulo their number. Its places, sizes and background are jittered by counter-based
    random numbers of (`seed`, index), in the ranges of `SceneSampler.lay_out`; relative places of attachments are the plan's.
    So a batch is a function of its indices, on any device and however it is split. Nothing is read back to the host, and
    `torch.compile` compiles it as one graph. With `single_pose` single icons have one size and place; None: as the bank's
    data section says.

    Raises:
        ConfigError: if the bank was made with other sprites.
    """

    # buffers
    plans: Tensor
    icons: Tensor
    turns: Tensor
    keys: Tensor
    captions: Tensor
    all_tokens: Tensor
    spots: Tensor
    concepts: Tensor
    ranges: Tensor
    is_single: Tensor
    atlas: Tensor
    empty_tokens: Tensor
    empty_mask: Tensor
    styles: Tensor
    matrices: Tensor
    colours: Tensor

    def __init__(self, bank: PlanBank, sprites: np.ndarray, seed: int = 0, single_pose: bool | None = None):
        super().__init__()
        if (made_with := bank.facts["sprites"]) != (found := sprites_fingerprint(sprites)):
            raise ConfigError(f"the plan bank was made with the sprites {made_with}, but these are {found}; make it again")
        self.seed, self.size, self.pad = seed, SPRITE_SIZE, bank.facts["pad"]
        self.single_pose = bool(bank.facts["data"].get("single_pose")) if single_pose is None else single_pose
        self.length = -(-max(int(bank.lengths.max()), len(bank.empty)) // _LENGTHS) * _LENGTHS
        self.has_colours, self.has_attachments = len(bank.matrices) > 0, len(bank.relations) > 0
        empty = np.pad(bank.empty, (0, self.length - len(bank.empty)), constant_values=self.pad)
        tables = _plan_tables(bank) | _layout_tables(bank, self.single_pose) | _caption_tables(bank, self.length)
        tables |= {
            "atlas": sprites if sprites.flags.writeable else np.array(sprites),
            "empty_tokens": empty.astype(np.int64),
            "empty_mask": np.arange(self.length) < len(bank.empty),
            "styles": bank.icon_styles.astype(np.int64),
            "matrices": np.concatenate([np.eye(3, dtype=np.float32)[None], bank.matrices.reshape(-1, 3, 3)]),
            "colours": np.array([WHITE, *ALL_GROUNDS.values()]),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The examples `indices` [B] on `device`, to which the tables are moved first; None: where they are."""
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
        layout, attached, ground, caption = self.plans[plans].long().unbind(1)
        icons, random = self.icons[plans].long(), scalars(self.seed, indices)
        spots = torch.where(attached < 0, layout, attached + len(LAYOUTS))
        concepts = self.concepts[spots]  # [B, L]
        layers = self._layers(indices, random, layout, self.spots[spots])
        layers.icons = torch.where(concepts < 0, -1, icons.gather(1, concepts.clamp_min(0)))
        turns = self.turns[plans].long().gather(1, concepts.clamp_min(0))  # [B, L]
        if self.has_colours:
            layers.matrices = self.matrices[turns]
        text, named, names_style = self._text(caption)
        background = self._background(indices, ground)
        style = self.styles[icons[:, 0]]
        return {
            "index": indices,
            "image": compose(self.atlas, layers, background, self.size),
            **text,
            "key": self.keys[plans],
            "style": style,
            "caption_style": torch.where(names_style, style, -1),
            "icon": torch.where(self.is_single[layout], icons[:, 0], -1),
            "random": random,
            "rows": torch.where(torch.arange(2, device=named.device) < named[:, None], icons[:, :2], -1),
            "sides": self._sides(layers, concepts, attached) * (named == 2)[:, None, None],
            **_layer_columns(layers, turns),
            "background": background / 127.5 - 1,
        }

    def empty(self, count: int) -> tuple[Tensor, Tensor]:
        """`tokens` and `mask` [count, N] of the empty caption, for examples whose text is dropped."""
        return self.empty_tokens.expand(count, -1), self.empty_mask.expand(count, -1)

    @torch.no_grad()
    def single_images(self, icons: Tensor) -> Tensor:
        """The icons [B] in the pose of `single_pose`: uint8 [B, 3, 64, 64]."""
        half = torch.full((len(icons), 1), 0.5, device=icons.device)
        layers = Layers(icons[:, None], half, half, torch.full_like(half, POSE_SIZE))
        return compose(self.atlas, layers, self.colours[:1].expand(len(icons), -1), self.size)

    def _layers(self, indices: Tensor, random: Tensor, layout: Tensor, spots: Tensor) -> Layers:
        """Layers at `spots` [B, L, 3] with random jitter of place and size; the caller sets their icons."""
        growth, least, most, shift = self.ranges[layout].unbind(1)  # [B] each
        fitted = (layout == len(LAYOUTS))[:, None]  # all layers of attachments move and scale together, around the centre
        offsets = uniform(self.seed, Stream.SCENE_PLACE, indices, spots.shape[1], 2) * 2 - 1  # [B, L, 2]
        size = spots[..., 2] + (growth * random[:, Stream.SCENE_SIZE])[:, None]  # [B, L]
        scale = (least + (most - least) * random[:, Stream.SCENE_SHRINK])[:, None]
        shift = shift[:, None] * torch.where((size < LARGE) | fitted, 1.0, LARGE_SHIFT)
        moved = shift[..., None] * torch.where(fitted[..., None], offsets[:, :1], offsets)
        places = moved + torch.where(fitted[..., None], 0.5 + scale[..., None] * spots[..., :2], spots[..., :2])
        x, y = places.unbind(2)
        return Layers(torch.empty_like(layout)[:, None], x, y, size * scale)

    def _background(self, indices: Tensor, ground: Tensor) -> Tensor:
        """Colours [B, 3] from 0 to 255."""
        shift = integers(self.seed, Stream.SCENE_BACKGROUND, indices, 3, below=2 * GROUND_SHIFT + 1) - GROUND_SHIFT
        return (self.colours[ground] + shift * (ground > 0)[:, None]).clamp(0, 255)

    def _text(self, caption: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`tokens`, `mask` and `names`; the number of named concepts [B], and whether the style is named [B]."""
        start, length, first, after_first, second, after_second, flags = self.captions[caption].long()[..., None].unbind(1)
        at = torch.arange(self.length, device=caption.device)  # [N]
        mask = at < length  # [B, N]
        tokens = torch.where(mask, self.all_tokens[start + at].long(), self.pad)
        in_name = [((at >= begin) & (at < end)).to(torch.int8) for begin, end in ((first, after_first), (second, after_second))]
        text = {"tokens": tokens, "mask": mask, "names": in_name[0] - in_name[1]}
        return text, flags[:, 0] & NAMED, (flags[:, 0] & NAMES_STYLE) > 0

    def _sides(self, layers: Layers, concepts: Tensor, attached: Tensor) -> Tensor:
        """int8 [B, PLACES, PLACES]: 1 where only the first concept's squares cover a place, -1 where the second's do.

        For attachments: of two drawings the one that is visible there.
        """
        at = (torch.arange(PLACES, device=concepts.device) + 0.5) / PLACES
        left, top, size = (t[..., None] for t in (layers.x - layers.size / 2, layers.y - layers.size / 2, layers.size))
        across, down = (at - left) / size, (at - top) / size  # [B, L, PLACES], in the icon's own square
        inside = ((across > 0) & (across < 1))[..., None, :] & ((down > 0) & (down < 1))[..., None]
        sign = ((concepts == 0).to(torch.int8) - (concepts == 1).to(torch.int8))[..., None, None]  # [B, L, 1, 1]
        sides = (inside * sign).sum(1, dtype=torch.int8)
        if not self.has_attachments:
            return sides
        side = self.atlas.shape[1]
        column, row = ((t * side).long().clamp(0, side - 1) for t in (across, down))
        icons = layers.icons.clamp_min(0)[..., None, None]
        opaque = inside & (self.atlas[icons, row[..., None], column[..., None, :], 3] > 127)
        visible = torch.where(opaque[:, 1], sign[:, 1], opaque[:, 0] * sign[:, 0])  # the upper covers the lower
        return torch.where((attached >= 0)[:, None, None], visible, sides)


def _layer_columns(layers: Layers, turns: Tensor) -> dict[str, Tensor]:
    """`boxes`, `layers` and `recoloured`, as `EmojiScenes` has them; `turns` [B, L] is 0 for layers in their own colours."""
    shown, missing = layers.icons >= 0, MAX_LAYERS - layers.icons.shape[1]
    boxes = torch.stack([layers.x, layers.y, layers.size], -1) * shown[..., None]
    return {
        "boxes": F.pad(boxes, (0, 0, 0, missing)),
        "layers": F.pad(layers.icons, (0, missing), value=-1),
        "recoloured": F.pad((turns > 0) & shown, (0, missing)),
    }


def _plan_tables(bank: PlanBank) -> dict[str, np.ndarray]:
    """`plans` int32 [P, 4], layout, attachment (-1 for none), ground, caption; `icons` int32 [P, C], 0 for none; `turns` int32
    [P, C], rows of the matrices, 0 for none; `keys`."""
    wanted = bank.icons.astype(np.int64) * 8 + bank.colours
    turns = np.zeros_like(wanted)
    if len(bank.turned):
        at = np.minimum(np.searchsorted(bank.turned, wanted), len(bank.turned) - 1)
        turns = np.where(bank.turned[at] == wanted, at + 1, 0)
    layouts = np.where(bank.layouts == ATTACHED, len(LAYOUTS), bank.layouts)
    plans = np.stack([layouts, bank.attachments(), bank.grounds, bank.captions], 1)
    icons = np.where(bank.icons == NO_ICON, 0, bank.icons)
    found = {"plans": plans, "icons": icons, "turns": turns}
    return {name: table.astype(np.int32) for name, table in found.items()} | {"keys": bank.keys()}


def _caption_tables(bank: PlanBank, length: int) -> dict[str, np.ndarray]:
    """`captions` int32 [U, 7]: start in `all_tokens`, length, spans of both names, flags."""
    lengths = bank.lengths.astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    captions = np.concatenate([starts[:, None], lengths[:, None], bank.spans, bank.flags[:, None]], 1).astype(np.int32)
    tokens = np.pad(bank.tokens.astype(np.int32), (0, length), constant_values=bank.facts["pad"])
    return {"captions": captions, "all_tokens": tokens}


def _layout_tables(bank: PlanBank, single_pose: bool) -> dict[str, np.ndarray]:
    """Of all layouts, and after them of all attachments.

    `spots` float32 [layouts + A, L, 3] and `concepts` int64 [layouts + A, L], -1 for no layer. `ranges` float32
    [layouts + 1, 4] has the growth of a size, the least and the largest random factor of it, and the largest shift of
    centres; `is_single` is bool [layouts + 1]. The last row of these two is of all attachments.
    """
    used = [LAYOUTS[number] for number in np.unique(bank.layouts) if number != ATTACHED]
    most = max([len(layout.spots) for layout in used] + [bank.orders.shape[1]] * (len(bank.orders) > 0))
    spots = np.full((len(LAYOUTS) + len(bank.orders), most, 3), 0.5, np.float32)
    concepts = np.full(spots.shape[:2], -1)
    ranges = np.zeros((len(LAYOUTS) + 1, 4), np.float32)
    for number, layout in enumerate(LAYOUTS):
        count = min(len(layout.spots), most)
        spots[number, :count], concepts[number, :count] = layout.spots[:count], layout.concepts[:count]
        ranges[number] = layout.growth, layout.shrink, 1, SHIFT
        if layout.posed and single_pose:
            spots[number, 0, 2] = POSE_SIZE if layout.growth else layout.spots[0][2]
            ranges[number] = 0, 1, 1, 0
    ranges[-1] = 0, *FIT_SIZES, FIT_SHIFT
    if len(bank.orders):
        kept, none = bank.orders.shape[1], bank.orders == NO_CONCEPT
        spots[len(LAYOUTS) :, :kept] = np.where(none[..., None], 0.5, bank.places * PLACE_UNIT)
        concepts[len(LAYOUTS) :, :kept] = np.where(none, -1, bank.orders.astype(np.int64))
    is_single = np.array([layout.kind == "single" for layout in LAYOUTS] + [False])
    return {"spots": spots, "concepts": concepts, "ranges": ranges, "is_single": is_single}
