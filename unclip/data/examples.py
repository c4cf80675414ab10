"""Training examples by index: the same (seed, index) is the same example on any process and after any resume."""

import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from upsamplers.degrade import bsr

from ..io.pixels import float_to_uint8
from ..runtime.config import ConfigError, construct
from .captioned_images import CaptionedImages, ImageCrops
from .captions import concepts_of_layers, scene_spans
from .icon_packages import SPRITE_SIZE, STYLES
from .image_files import check_there
from .layouts import MAX_LAYERS, PLACES
from .render import BACKGROUNDS, WHITE, Layer, apply_matrix, flatten, hue_rotation, render_svg
from .scene_settings import SceneSettings
from .scenes import IconSet, Scene, SceneSampler, mentions_style, split_of_concept

_CENTRES = (np.arange(PLACES) + 0.5) / PLACES


@dataclass(eq=False)
class EmojiScenes(Dataset):
    """Endless captioned scenes at 64 px; the fields after `seed` are those of `SceneSettings`.

    Items: `index` int; `image` uint8 [3, 64, 64]; `caption` str; `key` int64, equal for scenes of the same meaning; `style`
    the style's number; `caption_style` the same if the caption names the style, else -1; `random` float32 [16], uniform in
    [0, 1): the example's own random numbers; `icon` the row of the only icon of the image, on white in its own colours, else
    -1. For the grounding loss: `spans` int64 [2, 2], the characters of the caption that name the first and the second concept
    (start, end; -1 for none); `rows` int64 [2], the rows of their icons (-1 for none); `sides` int8 [PLACES, PLACES], the
    cells that only the first concept covers (1), only the second (-1), neither or both (0). If one is attached to the other,
    `sides` says which of them is visible in a cell. Of the layers, back to front: `boxes` float32 [MAX_LAYERS, 3], their
    centre x, y and size, 0 of none; `layers` int64 [MAX_LAYERS], the rows of their icons, -1 of none; `recoloured` bool
    [MAX_LAYERS]; and `background` float32 [3] in [-1, 1].
    """

    path: str
    split: str = "train"
    seed: int = 0
    kinds: list[str] | dict[str, float] | None = None
    contrast: float = 0.0
    groups: dict[str, float] | None = None
    all_concepts: bool | float = False
    loose: float = 0.0
    words: float = 0.0
    single_pose: bool = False
    sentences: float = 0.0

    def __post_init__(self) -> None:
        self.icons, self.size = IconSet.load(self.path), SPRITE_SIZE
        settings = {f.name: getattr(self, f.name) for f in fields(SceneSettings) if hasattr(self, f.name)}
        self.sampler = SceneSampler(self.icons, self.split, self.seed, **settings)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.sampler.scene(index)
        style = STYLES.index(scene.style)
        image = torch.from_numpy(self.icons.pixels(scene)).permute(2, 0, 1).contiguous()
        return {
            "index": index,
            "image": image,
            "caption": scene.caption,
            "key": zlib.crc32(scene.key.encode()),
            "style": style,
            "caption_style": style if mentions_style(scene) else -1,
            "icon": scene.layers[0].icon if scene.kind == "single" else -1,
            "random": torch.from_numpy(np.random.default_rng([self.seed, 3, index]).random(16, dtype=np.float32)),
            **_grounding(scene, self.icons),
            **_layers(scene),
        }


def _grounding(scene: Scene, icons: IconSet) -> dict[str, torch.Tensor]:
    """`spans`, `rows` and `sides`, as `EmojiScenes` gives them."""
    spans, rows = torch.full((2, 2), -1), torch.full((2,), -1)
    sides = np.zeros((PLACES, PLACES), np.int8)
    order = concepts_of_layers(scene)
    for number, span in enumerate(scene_spans(scene)):
        spans[number], rows[number] = torch.tensor(span), scene.layers[order.index(number)].icon
    if rows[1] >= 0:
        for number, layer in zip(order, scene.layers, strict=True):
            sign = (1, -1)[number]
            if scene.kind == "attachment":  # the upper of two covers the lower one
                sides[_opaque(layer, icons)] = sign
            else:
                sides += sign * _square(layer).astype(np.int8)
    return {"spans": spans, "rows": rows, "sides": torch.from_numpy(sides)}


def _layers(scene: Scene) -> dict[str, torch.Tensor]:
    """`boxes`, `layers`, `recoloured` and `background`, as `EmojiScenes` gives them."""
    boxes, rows = torch.zeros(MAX_LAYERS, 3), torch.full((MAX_LAYERS,), -1)
    recoloured = torch.zeros(MAX_LAYERS, dtype=torch.bool)
    for n, layer in enumerate(scene.layers):
        boxes[n], rows[n] = torch.tensor([layer.x, layer.y, layer.size]), layer.icon
        recoloured[n] = layer.matrix is not None
    background = torch.tensor(scene.background) / 127.5 - 1
    return {"boxes": boxes, "layers": rows, "recoloured": recoloured, "background": background}


def _square(layer: Layer) -> np.ndarray:
    """The cells [PLACES, PLACES] bool whose centre an icon's square covers."""
    across, down = (abs(_CENTRES - centre) < layer.size / 2 for centre in (layer.x, layer.y))
    return down[:, None] & across


def _opaque(layer: Layer, icons: IconSet) -> np.ndarray:
    """The cells [PLACES, PLACES] bool whose centre is opaque in an icon's drawing."""
    alpha = np.asarray(icons.sprites[layer.icon][..., 3])
    cells = [
        np.floor((_CENTRES - centre + layer.size / 2) / layer.size * len(alpha)).astype(int) for centre in (layer.x, layer.y)
    ]
    across, down = (cell.clip(0, len(alpha) - 1) for cell in cells)
    return _square(layer) & (alpha[down[:, None], across] > 127)


@dataclass(eq=False)
class EmojiCrops(Dataset):
    """Endless crops of single icons rendered at `size` px from their SVG; `crop` is the crops' share of the side.

    A third of the icons have their hue rotated and a fifth have a coloured background, as in scenes. Crops of a flat colour
    are sampled again. With `crops_each` above 1 an icon is rendered once and cropped that often, because at 1024 px rendering
    a crop costs half as much as rendering the icon; crops of `POOL` icons alternate, so that a batch holds many icons. Items:
    `index`, `image` uint8 [3, S, S] with S = crop * size, `random` as in `EmojiScenes`.
    """

    path: str
    split: str = "train"
    seed: int = 0
    size: int = 256
    crop: float = 0.25
    crops_each: int = 1

    TRIES: ClassVar[int] = 8
    POOL: ClassVar[int] = 32

    def __post_init__(self) -> None:
        if self.crops_each < 1:
            raise ValueError(f"crops_each must be at least 1, got {self.crops_each}")
        self.icons = IconSet.load(self.path)
        self.renderings: dict[int, np.ndarray] = {}
        rows = [n for n, icon in enumerate(self.icons.icons) if split_of_concept(icon["concept"]) == self.split]
        self.rows = [n for n in rows if not self.icons.icons[n]["tone"]]
        if not self.rows:
            raise ValueError(f"the icons of {self.path} hold no concept of the split {self.split!r}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 4, len(self.split), index])
        for _ in range(self.TRIES):
            rgba = self._crop(rng) if self.crops_each == 1 else self._crop_of(self._rendering(index), rng)
            background = WHITE
            if rng.random() < 0.2:
                background = BACKGROUNDS[list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]]
            rotation = hue_rotation(rng.uniform(0, 360), rng.uniform(0.7, 1.2)) if rng.random() < 0.33 else None
            if rotation is not None:
                rotated = apply_matrix(rgba[..., :3].astype(np.float32) / 255, rotation)
                rgba = np.concatenate([(rotated * 255).round().astype(np.uint8), rgba[..., 3:]], -1)
            image = flatten(rgba, background)
            if image.std() > 6:
                break
        return {
            "index": index,
            "image": torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            "random": torch.from_numpy(rng.random(16, dtype=np.float32)),
        }

    def _crop(self, rng: np.random.Generator) -> np.ndarray:
        svg = self._svg(rng)
        left, top = rng.uniform(0, 1 - self.crop, 2)
        window = (round(left * self.size) / self.size, round(top * self.size) / self.size, self.crop)
        return render_svg(svg, round(self.crop * self.size), window)

    def _svg(self, rng: np.random.Generator) -> str:
        return self.icons.icons[self.rows[int(rng.integers(len(self.rows)))]]["svg"]

    def _crop_of(self, whole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = round(self.crop * self.size)
        left, top = rng.integers(self.size - side + 1, size=2)
        return whole[top : top + side, left : left + side]

    def _rendering(self, index: int) -> np.ndarray:
        """The rendered icon [size, size, 4] that crop `index` is cut from; cached, and a function of the index alone."""
        number = index // (self.POOL * self.crops_each) * self.POOL + index % self.POOL
        if number not in self.renderings:
            if len(self.renderings) >= self.POOL:
                del self.renderings[next(iter(self.renderings))]
            rng = np.random.default_rng([self.seed, 7, len(self.split), number])
            self.renderings[number] = render_svg(self._svg(rng), self.size)
        return self.renderings[number]


class Degraded(Dataset):
    """Crops with `low` beside `image`: the same degraded as by BSRGAN, `scale` times smaller, uint8 [3, S / scale, S / scale].

    The data workers do this, because JPEG compression runs on the CPU.
    """

    def __init__(self, crops: Dataset, seed: int, scale: int):
        self.crops, self.seed, self.scale = crops, seed, scale

    def __getitem__(self, index: int) -> dict[str, Any]:
        crop = self.crops[index]
        low = bsr(crop["image"] / 255, np.random.default_rng([self.seed, 6, index]), self.scale)
        return crop | {"low": float_to_uint8(low)}


def seeded_noise(seed: int, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Normal noise for examples `indices`, of the rows' shape, dtype and device of `like` [B, ...].

    Each row is sampled by its own generator, in fp32 on the CPU, where `indices` are too: it is the same for every device.
    """
    if torch.compiler.is_compiling():
        return torch.ops.unclip.seeded_noise(seed, indices, like)
    rows = []
    for index in indices.tolist():
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        rows.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(rows).to(like, non_blocking=True)


@torch.library.custom_op("unclip::seeded_noise", mutates_args=())
def _seeded_noise(seed: int, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`seeded_noise` as one operation of a compiled graph, which cannot hold generators."""
    return seeded_noise(seed, indices, like)


@_seeded_noise.register_fake
def _(seed: int, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(like.shape)


def captioned_examples(data: dict, split: str = "train", seed: int = 0, pixels: bool = True) -> Dataset:
    """The examples of a configuration's `data` section: emoji scenes, plain shapes, or the user's own captioned images.

    Without `pixels`, images whose embeddings are cached are not opened.
    """
    return _examples(data, (split, seed), (EmojiScenes, CaptionedImages), {"pixels": pixels})


def crop_examples(data: dict, size: int, split: str = "train", seed: int = 0) -> Dataset:
    """Crops of the same at `size` px, for an upsampler. Raises ConfigError for a `crop` outside (0, 1]."""
    crop = (data or {}).get("crop", 0.25)
    if isinstance(crop, int | float) and not 0 < crop <= 1:
        raise ConfigError(f"data.crop must be above 0 and at most 1, got {crop}")
    return _examples(data, (split, seed), (EmojiCrops, ImageCrops), {"size": size})


# How emoji scenes are composed; ignored for the user's own images, so that one configuration serves both.
_COMPOSED = {"kinds", "groups", "contrast", "all_concepts", "loose", "words", "single_pose", "sentences"}
# The keys of the `data` section that a held-out split shares with training: where the data is, how it is cropped and what
# is held out, not how it is sampled.
_SHARED = {
    *("path", "size", "crop", "caption_column", "image_column", "max_unreadable", "subset", "streaming", "embeddings"),
    *("all_concepts", "single_pose"),
}


def _examples(data: dict, of: tuple[str, int], kinds: tuple[type, type], fixed: dict[str, Any]) -> Dataset:
    """Examples `of` a split and seed: the first of the `kinds` for emoji and shapes, the second for the user's own images."""
    split, seed = of
    emoji, own = kinds
    path = (data or {}).get("path")
    if not path:
        raise ConfigError(
            "data.path is missing: a dataset built by `unclip data emoji`, a folder of captioned images, or shapes"
        )
    kind = emoji if path == "shapes" or (Path(path) / "icons.json.gz").is_file() else own
    if kind is EmojiScenes:
        if data.get("embeddings"):
            raise ConfigError(f"data.embeddings: {path} is composed anew for every example; there is nothing to keep")
        fixed = {}
    elif kind is own:
        check_there(path)
        data = {k: v for k, v in data.items() if k not in _COMPOSED}
    if split != "train":
        data = {k: v for k, v in data.items() if k in _SHARED}
    return construct(kind, data, "data", split=split, seed=seed, **fixed)
