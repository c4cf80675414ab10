"""Icons that need no download: plain geometric shapes in four palettes, for tests and for trying out the trainer."""

import math
from functools import cache

import numpy as np

from .icon_packages import SPRITE_SIZE, STYLES
from .render import COLOURS, recolouring_matrix, render_svg

_PALETTES = {"noto": "#e2453c", "flat": "#3b7de0", "3d": "#2fae54", "twemoji": "#f0b429"}


def _polygon(corners: int, radius: float = 46, inner: float | None = None, turn: float = -90) -> str:
    points = []
    for n in range(corners * (2 if inner else 1)):
        angle = math.radians(turn + 360 * n / (corners * (2 if inner else 1)))
        r = inner if inner and n % 2 else radius
        points.append(f"{50 + r * math.cos(angle):.1f},{50 + r * math.sin(angle):.1f}")
    return f'<polygon points="{" ".join(points)}"/>'


SHAPES = {
    "circle": '<circle cx="50" cy="50" r="44"/>',
    "dot": '<circle cx="50" cy="50" r="16"/>',
    "ellipse": '<ellipse cx="50" cy="50" rx="46" ry="26"/>',
    "ring": '<path fill-rule="evenodd" d="M50 6a44 44 0 1 0 0.01 0zM50 30a20 20 0 1 1 -0.01 0z"/>',
    "square": '<rect x="10" y="10" width="80" height="80"/>',
    "frame": '<path fill-rule="evenodd" d="M8 8h84v84h-84zM30 30v40h40v-40z"/>',
    "bar": '<rect x="4" y="38" width="92" height="24"/>',
    "pillar": '<rect x="38" y="4" width="24" height="92"/>',
    "triangle": _polygon(3),
    "wedge": _polygon(3, turn=90),
    "pointer": _polygon(3, turn=0),
    "diamond": _polygon(4),
    "pentagon": _polygon(5),
    "hexagon": _polygon(6),
    "octagon": _polygon(8),
    "star": _polygon(5, inner=18),
    "spark": _polygon(4, inner=14),
    "burst": _polygon(9, inner=28),
    "cross": '<path d="M38 6h24v32h32v24h-32v32h-24v-32h-32v-24h32z"/>',
    "moon": '<path d="M66 8a44 44 0 1 0 0 84a36 36 0 1 1 0 -84z"/>',
    "crescent": '<path d="M30 6a46 46 0 1 1 -2 86a60 60 0 0 0 2 -86z"/>',
    "gem": '<polygon points="24,16 76,16 96,40 50,90 4,40"/>',
    "drop": '<path d="M50 6c20 30 32 42 32 58a32 30 0 0 1 -64 0c0 -16 12 -28 32 -58z"/>',
    "heart": '<path d="M50 90c-60 -44 -46 -80 -22 -80c12 0 20 8 22 16c2 -8 10 -16 22 -16c24 0 38 36 -22 80z"/>',
    "arch": '<path d="M8 92v-42a42 42 0 0 1 84 0v42h-24v-42a18 18 0 0 0 -36 0v42z"/>',
    "stripe": '<path d="M8 92l60 -84h24l-60 84z"/>',
}


@cache
def shape_icons() -> tuple[list[dict], np.ndarray]:
    """Rows like those of `icons.json.gz` and their sprites [N, 64, 64, 4]; drawn once, and shared."""
    icons, sprites = [], []
    for concept, markup in SHAPES.items():
        for style in STYLES:
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100"><g fill="{_PALETTES[style]}">{markup}</g></svg>'
            )
            sprite = render_svg(svg, SPRITE_SIZE)
            sprites.append(sprite)
            facts = {"svg": svg, "concept": concept, "tags": [], "group": "objects", "tone": "", "style": style}
            origin = {"source": "unclip.data.shapes", "licence": "Apache-2.0"}
            icons.append(facts | origin | {"colours": [c for c in COLOURS if recolouring_matrix(sprite, c) is not None]})
    return icons, np.stack(sprites)
