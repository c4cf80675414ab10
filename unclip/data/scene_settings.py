"""What scenes are sampled: how often each kind and each group of concepts comes, and how captions name them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plans import KIND_WEIGHTS, OPTIONAL_KINDS

# Weight of a concept of each group, relative to an animal: symbols and flags are many and rarely asked for.
GROUP_WEIGHTS = {
    "smileys-emotion": 1.0,
    "people-body": 0.4,
    "animals-nature": 1.0,
    "food-drink": 1.0,
    "travel-places": 0.8,
    "activities": 1.0,
    "objects": 0.9,
    "symbols": 0.25,
    "flags": 0.1,
}
TONE_SHARE = 0.2


@dataclass(frozen=True)
class SceneSettings:
    """Which scenes a `SceneSampler` samples.

    Attributes:
        kinds: The kinds of scene; as a mapping, with their weights. Default: KIND_WEIGHTS.
        contrast: Share of odd indices that repeat the scene before with one attribute changed (colour, number, place or
            background): hard negatives for contrastive training.
        tones: Share of single icons with a skin tone, where they have one.
        groups: Replaces entries of GROUP_WEIGHTS.
        all_concepts: No concept is held out whole; one of the four styles of a tenth of them is. A number is the weight of
            these concepts as single icons in training, relative to the others (True: 1), for networks that saw them late.
        loose: Share of single icons whose caption is informal: tags alone ("amphibian, green"), or the name among words that
            add nothing ("please draw a nice frog").
        words: Share of the single icons with an entry in the vocabulary (unclip/data/words.py) whose caption uses it:
            synonyms, narrower kinds, definitions.
        sentences: Share of single icons described in a sentence of tags, definitions and drawing facts
            (unclip/data/sentences.py); decided before `words` and `loose`.
        single_pose: A single icon whose caption names no size is always centred and POSE_SIZE large.

    Raises:
        ValueError: naming the setting and its value.
    """

    kinds: Sequence[str] | Mapping[str, float] | None = None
    contrast: float = 0.0
    tones: float = TONE_SHARE
    groups: dict[str, float] | None = None
    all_concepts: bool | float = False
    loose: float = 0.0
    words: float = 0.0
    single_pose: bool = False
    sentences: float = 0.0

    def __post_init__(self) -> None:
        unknown = set(self.kinds or ()) - set(KIND_WEIGHTS | OPTIONAL_KINDS)
        if unknown:
            raise ValueError(f"unknown kinds of scene {sorted(unknown)}; choose from {list(KIND_WEIGHTS | OPTIONAL_KINDS)}")
        _check_weights("groups", group_weights(self.groups), self.groups)
        _check_weights("kinds", self.kind_weights, self.kinds)
        for name in ("loose", "words", "sentences"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if not isinstance(self.all_concepts, int | float) or not 0 <= self.all_concepts < float("inf"):
            raise ValueError(f"all_concepts must be true, false or a number of at least 0, got {self.all_concepts!r}")

    @property
    def kind_weights(self) -> dict[str, float]:
        """The kinds of scene with their weights, which need not sum to 1."""
        if isinstance(self.kinds, Mapping):
            return dict(self.kinds)
        return {kind: (KIND_WEIGHTS | OPTIONAL_KINDS)[kind] for kind in self.kinds or KIND_WEIGHTS}


def group_weights(changes: Mapping[str, float] | None) -> dict[str, float]:
    """GROUP_WEIGHTS with some entries replaced. Raises ValueError for an unknown group."""
    unknown = set(changes or {}) - set(GROUP_WEIGHTS)
    if unknown:
        raise ValueError(f"unknown groups of concepts {sorted(unknown)}; choose from {list(GROUP_WEIGHTS)}")
    return GROUP_WEIGHTS | dict(changes or {})


def _check_weights(name: str, weights: dict[str, float], given: Any) -> None:
    wrong = [w for w in weights.values() if not isinstance(w, int | float) or not 0 <= w < float("inf")]
    if wrong or not sum(weights.values()):
        raise ValueError(f"weights of {name} must be numbers of at least 0, not all of them 0, got {given!r}")
