"""The table of unclip/data/attachments.yaml: anchor points of icons, what can be attached there, and common names."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def table() -> dict[str, Any]:
    """The table, with its points as fractions of the icon's square."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is ten times as fast
    found = yaml.load((Path(__file__).parent / "attachments.yaml").read_text(encoding="utf-8"), Loader=loader)
    for icons in (found["bases"], found["worn"]):
        for styles in icons.values():
            for style, points in styles.items():
                if isinstance(points, dict):
                    styles[style] = {name: tuple(v / 100 for v in point) for name, point in points.items()}
                elif isinstance(points, list):
                    styles[style] = tuple(v / 100 for v in points)
    return found


def common_name(concept: str) -> str:
    """The everyday name of an icon's concept in a scene: "dog" of "dog face", "cap" of "billed cap"."""
    return table()["names"].get(concept, concept)
