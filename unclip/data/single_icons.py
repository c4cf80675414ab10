"""Single icons in one pose, without captions: the training data of the draft head."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .icon_packages import STYLES
from .icons import IconSet
from .plans import split_of_icon
from .scene_settings import TONE_SHARE, group_weights


class SingleIcons(Dataset):
    """Endless single icons of a split, sampled as by `SceneSampler`: by group, then style, then skin tone.

    Items: `index` int; `row` int, the icon's; `style` its style's number; `random` float32 [4], uniform in [0, 1).
    `groups` replaces entries of GROUP_WEIGHTS; `tones` is the share of icons with a skin tone, where they have one;
    `all_concepts` is as for `SceneSampler`; the attribute `cumulative` float64 [N] holds the icons' cumulative probabilities.
    Raises ValueError if the split has no icon.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        seed: int = 0,
        groups: dict[str, float] | None = None,
        tones: float = TONE_SHARE,
        all_concepts: bool | float = False,
    ):
        self.icons, self.seed, self.split, self.all_concepts = IconSet.load(path), seed, split, bool(all_concepts)
        concept_weights = group_weights(groups)
        if not 0 <= tones <= 1:
            raise ValueError(f"tones must be in [0, 1], got {tones}")
        weights = np.zeros(len(self.icons))
        for concept, styles in self.icons.by_concept.items():
            weight = concept_weights[self.icons.groups[concept]] / len(styles)
            for style, rows in styles.items():
                if split_of_icon(concept, style, self.all_concepts) != split:
                    continue
                first = 1.0 if len(rows) == 1 else 1.0 - tones
                weights[rows[0]] += weight * first
                weights[rows[1:]] += weight * tones / max(len(rows) - 1, 1)
        if not weights.sum():
            raise ValueError(f"the icons of {path} hold none of the split {split!r}")
        self.cumulative = np.cumsum(weights) / weights.sum()
        self.styles = torch.tensor([STYLES.index(icon["style"]) for icon in self.icons.icons])

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng([self.seed, 8, len(self.split), index]).random(5)
        row = int(np.searchsorted(self.cumulative, random[0], side="right"))
        return {
            "index": index,
            "row": row,
            "style": int(self.styles[row]),
            "random": torch.from_numpy(random[1:].astype(np.float32)),
        }
