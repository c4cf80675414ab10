"""Scenes: true captions, fixed splits, and two renderers that agree."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.data.captions import name_spans
from unclip.data.examples import EmojiCrops, EmojiScenes
from unclip.data.icon_packages import STYLES
from unclip.data.render import (
    COLOURS,
    Layer,
    apply_matrix,
    colour_share,
    compose_sprites,
    compose_svg,
    flatten,
    hue_rotation,
    recolouring_matrix,
    render_svg,
)
from unclip.data.scenes import (
    GROUP_WEIGHTS,
    KIND_WEIGHTS,
    NUMBERS,
    IconSet,
    SceneSampler,
    is_everyday,
    split_of_concept,
    split_of_icon,
)
from unclip.data.words import Vocabulary, Words

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect width="10" height="10" fill="#e23b3b"/></svg>'
ROUND = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><circle cx="5" cy="5" r="4" fill="#3b7de0"/></svg>'
MARKUP = [SQUARE, ROUND]
SPRITES = np.stack([render_svg(m, 64) for m in MARKUP])
CIRCLE = compose_sprites([Layer(1, 0.5, 0.5, 0.77)], SPRITES, 64)


@pytest.fixture(scope="module")
def icons() -> IconSet:
    return IconSet.load("shapes")


layers = st.builds(
    Layer,
    icon=st.integers(0, 1),
    x=st.floats(0.1, 0.9),
    y=st.floats(0.1, 0.9),
    size=st.floats(0.15, 1.2),
    matrix=st.one_of(st.none(), st.builds(hue_rotation, st.floats(0, 360), st.floats(0.5, 1.5))),
)


@settings(max_examples=40)
@given(image=st.lists(layers, min_size=1, max_size=4), ground=st.tuples(*[st.integers(0, 255)] * 3))
def test_blended_sprites_show_what_the_svg_shows(image, ground):
    exact = flatten(render_svg(compose_svg(image, MARKUP.__getitem__, ground), 64)).astype(int)
    blended = compose_sprites(image, SPRITES, 64, ground).astype(int)
    assert np.abs(exact - blended).mean() < 3.0


def test_pixels_are_exact_under_autocast():
    image = [Layer(1, 0.5, 0.5, 0.77)]
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(compose_sprites(image, SPRITES, 64), CIRCLE)
    assert np.array_equal(compose_sprites(image, SPRITES, 64), CIRCLE)


def test_a_window_is_a_crop():
    svg = compose_svg([Layer(1, 0.5, 0.5, 0.9)], MARKUP.__getitem__)
    whole, corner = render_svg(svg, 256), render_svg(svg, 64, (0.25, 0.5, 0.25))
    assert np.abs(whole[128:192, 64:128].astype(int) - corner).max() <= 2


@given(degrees=st.floats(0, 360))
def test_turning_back_gives_the_colours_again(degrees):
    rgb = np.array([[0.45, 0.5, 0.55], [0.5, 0.5, 0.5]], dtype=np.float32)
    turned = apply_matrix(rgb, hue_rotation(degrees))
    np.testing.assert_allclose(apply_matrix(turned, hue_rotation(-degrees)), rgb, atol=5e-3)
    np.testing.assert_allclose(turned[1], rgb[1], atol=2e-3)  # grey stays


@pytest.mark.parametrize("colour", COLOURS)
def test_a_recoloured_sprite_has_the_colour_that_its_caption_names(colour):
    sprites = [*SPRITES, render_svg(SQUARE.replace("#e23b3b", "#f0c030"), 64)]
    matrices = [recolouring_matrix(sprite, colour) for sprite in sprites]
    assert any(matrices)
    for sprite, matrix in zip(sprites, matrices, strict=True):
        assert matrix is None or colour_share(sprite, colour, matrix) >= 0.6


def test_a_sprite_of_many_hues_is_not_recoloured():
    rainbow = np.full((64, 64, 4), 255, dtype=np.uint8)
    rainbow[:32, :, :3], rainbow[32:, :, :3] = (230, 30, 30), (30, 230, 230)
    assert recolouring_matrix(rainbow, "blue") is None
    assert recolouring_matrix(np.full((64, 64, 4), 255, dtype=np.uint8), "blue") is None


@settings(max_examples=30)
@given(index=st.integers(0, 10**6), split=st.sampled_from(["train", "validation", "test"]))
def test_an_index_is_one_scene_and_stays_in_its_split(icons, index, split):
    scene = SceneSampler(icons, split).scene(index)
    assert scene == SceneSampler(icons, split).scene(index)
    concepts = {icons.icons[layer.icon]["concept"] for layer in scene.layers}
    styles = {icons.icons[layer.icon]["style"] for layer in scene.layers}
    assert styles == {scene.style}
    held_out = {split_of_icon(c, scene.style) for c in concepts} - {"train"}
    if split == "train":
        assert not held_out


def test_splits_share_no_combination(icons):
    def combinations(split: str) -> set[str]:
        """Meanings of a split's scenes whose icons are themselves in training: held out for their combination alone."""
        sampler = SceneSampler(icons, split, kinds=("colour", "count"))
        scenes = [sampler.scene(i) for i in range(300)]
        concepts = [icons.icons[s.layers[0].icon]["concept"] for s in scenes]
        return {s.key for s, c in zip(scenes, concepts, strict=True) if split_of_icon(c, s.style) == "train"}

    seen, validation, test = map(combinations, ("train", "validation", "test"))
    assert seen and validation and test
    assert not (seen & validation or seen & test or validation & test)


def test_of_a_concept_that_is_not_held_out_whole_one_style_is(icons):
    unseen = {c: {s for s in STYLES if split_of_icon(c, s, all_concepts=True) != "train"} for c in icons.concepts}
    whole = {c for c in icons.concepts if split_of_concept(c) != "train"}
    assert whole and all(len(unseen[c]) == 1 for c in whole)
    assert all(unseen[c] == {s for s in STYLES if split_of_icon(c, s) != "train"} for c in unseen if c not in whole)
    for kind in ("single", "pair"):
        sampler = SceneSampler(icons, "train", kinds=(kind,), all_concepts=True)
        plans = [sampler.plan(n) for n in range(400)]
        assert whole & {c for plan in plans for c in plan.concepts}
        assert not [plan for plan in plans if any(plan.style in unseen[c] for c in plan.concepts)]
    for split in ("validation", "test"):
        plans = [SceneSampler(icons, split, all_concepts=True).plan(n) for n in range(200)]
        assert all(plan.split(all_concepts=True) == split and plan.split() != "train" for plan in plans)


def test_concepts_that_came_late_come_as_often_as_is_said(icons):
    def share(all_concepts: bool | float) -> float:
        sampler = SceneSampler(icons, "train", kinds=("single",), all_concepts=all_concepts)
        return sum(split_of_concept(sampler.plan(n).concepts[0]) != "train" for n in range(600)) / 600

    often, late = share(True), share(4.0)
    assert share(False) == 0 < often < late
    assert late == pytest.approx(4 * often / (1 + 3 * often), abs=0.05)
    for wrong in (-1, float("nan"), "often"):
        with pytest.raises(ValueError, match="all_concepts must be"):
            SceneSampler(icons, "train", all_concepts=wrong)


def test_captions_say_what_is_drawn(icons):
    sampler = SceneSampler(icons, "train")
    kinds = set()
    for index in range(400):
        scene = sampler.scene(index)
        kinds.add(scene.kind)
        names = [icons.icons[layer.icon]["concept"] for layer in scene.layers]
        if scene.kind == "count":
            assert scene.caption.find(NUMBERS[len(names)]) >= 0
        elif scene.kind == "relation":
            first, second = scene.layers
            words = scene.caption
            assert words.index(names[0]) < words.rindex(names[1])
            assert (" left " not in words) or first.x < second.x
            assert (" right " not in words) or first.x > second.x
            assert not any(w in words for w in (" above ", " over ", " on top ")) or first.y < second.y
            assert not any(w in words for w in (" below ", " under ")) or first.y > second.y
        else:
            assert all(name in scene.caption for name in names)
    assert kinds == set(KIND_WEIGHTS)


def test_loose_captions_still_mean_the_icon(icons):
    tagged = dataclasses.replace(icons, icons=[dict(i, tags=["kitty", "round", "drawn"]) for i in icons.icons])
    loose = SceneSampler(tagged, "train", kinds=("single",), loose=1.0)
    scenes = [loose.scene(n) for n in range(300)]
    by_name = [s.names[0] in s.caption for s in scenes]
    assert 0.3 < sum(by_name) / len(scenes) < 0.8
    assert all(n or "round" in s.caption or "drawn" in s.caption for s, n in zip(scenes, by_name, strict=True))
    assert not [s.caption for s in scenes if is_everyday(s.caption)]
    plain, same = (SceneSampler(tagged, "train", loose=share) for share in (0.0, 1.0))
    for n in range(60):
        one, other = plain.scene(n), same.scene(n)
        assert one.kind == "single" or one == other  # nothing but a single icon is said informal_caption
        assert one.kind != "single" or (one.key.split("|")[0], one.style) == (other.key.split("|")[0], other.style)
    with pytest.raises(ValueError, match=r"loose must be in \[0, 1\], got 2"):
        SceneSampler(tagged, "train", loose=2)


def test_other_words_take_a_name_s_place(icons):
    said = {c: Words([f"{c} by name"], [f"kind of {c}"], [f"what {c} is"]) for c in icons.concepts[1:]}
    called = dataclasses.replace(icons)
    called.words = Vocabulary(said, ["meadow"], ["fluffy"])
    scenes = [SceneSampler(called, "train", seed=3, words=1.0, kinds=("single",)).scene(n) for n in range(300)]
    concepts = [called.icons[s.layers[0].icon]["concept"] for s in scenes]
    told = [
        any(w in s.caption for w in (f"{c} by name", f"kind of {c}", f"what {c} is"))
        for s, c in zip(scenes, concepts, strict=True)
    ]
    assert all(t <= (c in said) for t, c in zip(told, concepts, strict=True)) and 0.6 < np.mean(told) < 0.95
    assert all(t or c in s.caption for t, c, s in zip(told, concepts, scenes, strict=True))
    assert all(any(part in s.caption for s in scenes) for part in (" by name", "kind of ", "what ", "fluffy ", "meadow"))
    plain, same = (SceneSampler(called, "train", words=share) for share in (0.0, 1.0))
    for n in range(60):
        one, other = plain.scene(n), same.scene(n)
        assert one.kind == "single" or one == other  # nothing but a single icon is said in other words
        assert one.kind != "single" or (one.key.split("|")[0], one.style) == (other.key.split("|")[0], other.style)
    with pytest.raises(ValueError, match=r"words must be in \[0, 1\], got 2"):
        SceneSampler(called, "train", words=2)
    with pytest.raises(ValueError, match="no other words; build them again with `unclip data emoji`"):
        SceneSampler(icons, "train", words=0.5)


def test_contrasting_neighbours_differ_in_one_attribute(icons):
    sampler = SceneSampler(icons, "train", kinds=("count",), contrast=1.0)
    for index in range(0, 40, 2):
        first, second = sampler.scene(index), sampler.scene(index + 1)
        assert icons.icons[first.layers[0].icon]["concept"] == icons.icons[second.layers[0].icon]["concept"]
        assert len(first.layers) != len(second.layers)


def test_groups_are_drawn_as_often_as_they_weigh(icons):
    group = icons.groups[icons.concepts[0]]
    others = {name: 0.0 for name in GROUP_WEIGHTS if name != group}
    alone = SceneSampler(icons, "train", groups=others, kinds=("single", "colour"))
    assert {icons.groups[c] for n in range(40) for c in alone.plan(n).concepts} == {group}
    same, plain = SceneSampler(icons, "train", groups={group: GROUP_WEIGHTS[group]}), SceneSampler(icons, "train")
    assert [same.plan(n) for n in range(20)] == [plain.plan(n) for n in range(20)]
    mostly = SceneSampler(icons, "train", kinds={"single": 3, "count": 1, "pair": 0})
    found = [mostly.plan(n).kind for n in range(300)]
    assert abs(found.count("single") / 300 - 0.75) < 0.07 and set(found) == {"single", "count"}
    for wrong in ({group: -1.0}, {group: "much"}, dict.fromkeys(GROUP_WEIGHTS, 0)):
        with pytest.raises(ValueError, match="weights of groups must be numbers of at least 0, not all of them 0, got"):
            SceneSampler(icons, "train", groups=wrong)
    with pytest.raises(ValueError, match=r"unknown groups of concepts \['beasts'\]"):
        SceneSampler(icons, "train", groups={"beasts": 1.0})


def test_impossible_requests_are_named(icons):
    with pytest.raises(ValueError, match="weights of kinds must be numbers of at least 0, not all of them 0, got"):
        SceneSampler(icons, "train", kinds={"single": 0})
    with pytest.raises(ValueError, match="unknown kinds of scene \\['dance'\\]"):
        SceneSampler(icons, "train", kinds=("dance",))
    with pytest.raises(FileNotFoundError, match="unclip data emoji --out nowhere"):
        IconSet.load("nowhere")


def test_examples_are_functions_of_their_index():
    several = EmojiCrops("shapes", size=256, crops_each=3)
    for examples in (EmojiScenes("shapes"), EmojiCrops("shapes", size=256), several):
        first, again, other = (examples[i] for i in (5, 5, 6))
        assert (first["image"] == again["image"]).all() and (first["random"] == again["random"]).all()
        assert (first["random"] != other["random"]).any()


def test_a_scene_of_two_says_where_each_is_and_where_its_caption_names_it(icons):
    examples = EmojiScenes("shapes", kinds=["relation", "pair"])
    on_white = np.full(3, 255)
    told = 0
    for n in range(80):
        example, scene = examples[n], examples.sampler.scene(n)
        sides = example["sides"].numpy().repeat(4, 0).repeat(4, 1)
        assert example["rows"].tolist() == [layer.icon for layer in scene.layers]
        for sign, span, layer, name in zip((1, -1), example["spans"].tolist(), scene.layers, scene.names, strict=True):
            assert scene.caption[slice(*span)] == name
            concept = icons.icons[layer.icon]["concept"]
            assert name == concept or name in icons.synonyms[concept]
            alone = compose_sprites([layer], icons.sprites, 64)
            drawn = (np.abs(alone.astype(int) - on_white).sum(-1) > 30)[sides == -sign]
            assert drawn.mean() < 0.02, f"{scene.caption}: the other's places show this one"
            assert (sides == sign).any()
            told += 1
        if scene.kind == "pair":
            (first, _), (second, _) = example["spans"].tolist()
            assert (first < second) == (scene.layers[0].x < scene.layers[1].x), "named from left to right"
    assert told == 160
    singles = EmojiScenes("shapes", kinds=["single", "count", "colour"])
    for n in range(40):
        example, scene = singles[n], singles.sampler.scene(n)
        (span, none), (row, no_row) = example["spans"].tolist(), example["rows"].tolist()
        assert none == [-1, -1] and no_row == -1 and not example["sides"].any()
        if scene.layers[0].matrix is not None:
            assert span == [-1, -1] and row == -1, "a turned icon is not what its embedding shows"
        else:
            assert row == scene.layers[0].icon and scene.caption[slice(*span)] == scene.names[0]


@pytest.mark.parametrize(
    ("caption", "names", "found"),
    [
        ("a hot dog left of a dog", ("hot dog", "dog"), ((2, 9), (20, 23))),
        ("a hot dog left of a dog", ("dog", "hot dog"), ((20, 23), (2, 9))),
        ("a catfish above a cat", ("cat", "catfish"), ((18, 21), (2, 9))),
        ("a cat", ("cat", "dog"), ()),
        ("a hot dog", ("hot dog", "dog"), ()),
    ],
)
def test_a_name_inside_the_other_is_not_meant(caption, names, found):
    assert name_spans(caption, names) == found


def test_crops_of_one_rendering_are_windows_of_it_whatever_was_asked_before(monkeypatch):
    monkeypatch.setattr(EmojiCrops, "POOL", 2)
    whole, crops = (EmojiCrops("shapes", size=64, crop=c, crops_each=3) for c in (1.0, 0.5))
    fresh = EmojiCrops("shapes", size=64, crop=0.5, crops_each=3)
    there = [crops[i]["image"] for i in range(24)]
    back = [fresh[i]["image"] for i in reversed(range(24))][::-1]
    assert all((a == b).all() for a, b in zip(there, back, strict=True)) and len(crops.renderings) <= 2
    first = whole._rendering(0)
    assert (first == whole._rendering(4)).all() and any((first != whole._rendering(n)).any() for n in (1, 6, 7, 12, 13))
    for index in (0, 5, 11):
        rgba = whole._rendering(index)
        found = crops._crop_of(rgba, np.random.default_rng(index))
        windows = np.lib.stride_tricks.sliding_window_view(rgba, (32, 32, 4)).reshape(-1, 32, 32, 4)
        assert (windows == found).all((1, 2, 3)).any()
    with pytest.raises(ValueError, match="crops_each must be at least 1, got 0"):
        EmojiCrops("shapes", crops_each=0)


def test_inflect_is_imported_when_a_caption_is_first_made_and_typeguard_stays_as_it_is(run):
    code = """
import sys, typeguard
before = typeguard.typechecked
from unclip.data.captions import plural, with_article
assert "inflect" not in sys.modules
assert (with_article("hourglass"), with_article("scissors"), plural("wolf")) == ("an hourglass", "scissors", "wolves")
assert typeguard.typechecked is before and sys.modules["inflect"].typechecked is before
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
