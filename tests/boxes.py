"""Icons with the emoji's names, for what goes together by name."""

import numpy as np

from unclip.data.icon_packages import STYLES
from unclip.data.icons import IconSet

GROUPS = {
    "animals-nature": ("dog face", "cat face", "dog", "horse", "teddy bear", "panda", "penguin", "tiger face", "rose", "owl")
}
GROUPS |= {
    "objects": ("crown", "top hat", "sunglasses", "glasses", "basket", "bed", "key", "headphone", "ribbon", "billed cap")
}
GROUPS |= {"food-drink": ("red apple", "bowl with spoon", "banana"), "travel-places": ("bicycle", "star", "canoe")}


def box_icons() -> IconSet:
    """Icons with the emoji's names, drawn as plain boxes, each concept of its own colour and each icon of its own extent."""
    rng, found, sprites = np.random.default_rng(0), [], []
    for group, concepts in GROUPS.items():
        for concept in concepts:
            colour = rng.integers(0, 200, 3)
            for style in STYLES:
                sprite = np.zeros((64, 64, 4), np.uint8)
                left, top = rng.integers(2, 12, 2)
                right, bottom = rng.integers(52, 62, 2)
                sprite[top:bottom, left:right] = (*colour, 255)
                sprites.append(sprite)
                facts = {"concept": concept, "group": group, "style": style, "tone": "", "tags": [], "svg": ""}
                found.append(facts | {"colours": ["red", "blue"]})
    return IconSet(found, np.stack(sprites))
