"""Single icons in one pose."""

import numpy as np
import pytest
import torch

from decoder.layout import POSE_SIZE
from unclip.data.examples import EmojiScenes
from unclip.data.icons import IconSet
from unclip.data.plans import split_of_icon
from unclip.data.render import Layer, compose_sprites
from unclip.data.scenes import SceneSampler
from unclip.data.single_icons import SingleIcons


@pytest.fixture(scope="module")
def icons() -> IconSet:
    return IconSet.load("shapes")


def test_the_pose_equals_a_scene_of_one_layer(icons):
    rows = range(min(24, len(icons)))
    composed = np.stack([compose_sprites([Layer(n, 0.5, 0.5, POSE_SIZE)], icons.sprites, 64) for n in rows])
    expected = torch.from_numpy(composed).permute(0, 3, 1, 2).float() / 255
    assert (icons.in_pose(rows) - expected).abs().max() <= 0.5 / 255 + 1e-5


def test_only_single_icons_without_a_size_have_the_pose(icons):
    posed, jittered = (SceneSampler(icons, "train", seed=3, single_pose=p) for p in (True, False))
    kinds = set()
    for index in range(400):
        scene, before = posed.scene(index), jittered.scene(index)
        assert (scene.caption, scene.kind, scene.background) == (before.caption, before.kind, before.background)
        kinds.add(scene.kind)
        if len(scene.layers) > 1:
            assert scene == before
        else:
            layer = scene.layers[0]
            assert (layer.x, layer.y) == (0.5, 0.5)
            assert (layer.size == POSE_SIZE) == (scene.kind != "size")
    assert {"single", "size", "relation", "count"} <= kinds


def test_examples_say_which_icon_is_all_there_is(icons):
    examples = EmojiScenes("shapes", seed=5, single_pose=True)
    singles = 0
    for index in range(100):
        example = examples[index]
        if example["icon"] >= 0:
            singles += 1
            shown = icons.in_pose([example["icon"]])[0]
            assert (example["image"].float() / 255 - shown).abs().max() < 1 / 255
        else:
            assert examples.sampler.scene(index).kind != "single"
    assert 20 < singles < 80


def test_rows_belong_to_the_split_and_come_by_their_weights(icons):
    examples = SingleIcons("shapes", seed=7)
    drawn = [examples[n] for n in range(3000)]
    for example in drawn:
        icon = icons.icons[example["row"]]
        assert split_of_icon(icon["concept"], icon["style"]) == "train"
    concepts = [icons.icons[e["row"]]["concept"] for e in drawn]
    counts = np.array([concepts.count(c) for c in sorted(set(concepts))])
    assert counts.min() > 0.4 * counts.mean()
    assert counts.max() < 2 * counts.mean()
    again = SingleIcons("shapes", seed=7)[11]
    assert again["row"] == drawn[11]["row"]
    assert torch.equal(again["random"], drawn[11]["random"])


def test_unknown_groups_and_shares_are_refused():
    with pytest.raises(ValueError, match="unknown groups of concepts \\['cars'\\]"):
        SingleIcons("shapes", groups={"cars": 1.0})
    with pytest.raises(ValueError, match=r"tones must be in \[0, 1\], got 2"):
        SingleIcons("shapes", tones=2)
