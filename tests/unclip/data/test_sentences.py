"""Sentences of one icon: what they say of its drawing is so."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from unclip.data.render import COLOURS, count_parts, dominant_colours
from unclip.data.scenes import IconSet, SceneSampler, is_everyday
from unclip.data.sentences import DrawingFacts, sentence_caption
from unclip.data.words import Vocabulary, Words


@pytest.fixture(scope="module")
def icons() -> IconSet:
    plain = IconSet.load("shapes")
    named = dataclasses.replace(plain, icons=[icon | {"tags": ["flat thing", "kitty", "20"]} for icon in plain.icons])
    named.words = Vocabulary({c: Words([f"other {c}"], sayings=[f"any shape called {c}"]) for c in plain.concepts[1:]})
    return named


def boxes(*drawn: tuple[int, int, int, int, tuple[int, int, int]]) -> np.ndarray:
    sprite = np.zeros((64, 64, 4), np.uint8)
    for top, bottom, left, right, colour in drawn:
        sprite[top:bottom, left:right] = (*colour, 255)
    return sprite


@pytest.mark.parametrize(
    ("colours", "words"),
    [
        ([(220, 40, 40)], ("red",)),
        ([(40, 90, 220), (250, 250, 250)], ("blue", "white")),
        ([(15, 15, 18), (130, 130, 134)], ("black", "gray")),
        ([(110, 70, 40)], ("brown",)),
        ([(70, 180, 80), (250, 210, 40), (240, 130, 180)], ("green", "yellow", "pink")),
    ],
)
def test_a_drawing_s_colours_come_by_how_much_they_cover(colours, words):
    widths = [30, 20, 12][: len(colours)]
    edges = pairwise([0, *np.cumsum(widths)])
    sprite = boxes(*[(10, 50, a, b, colour) for (a, b), colour in zip(edges, colours, strict=True)])
    assert dominant_colours(sprite) == words
    sprite[48:50] = (90, 40, 160, 255)
    assert dominant_colours(sprite) == words, "a small part is not told of"
    assert dominant_colours(np.zeros((64, 64, 4), np.uint8)) == ()


def test_parts_are_counted_where_they_are_alike():
    red = (200, 0, 0)
    assert count_parts(boxes((5, 15, 5, 15, red), (5, 15, 30, 40, red))) == 2
    assert count_parts(boxes(*[(5, 15, 2 + 12 * n, 10 + 12 * n, red) for n in range(5)])) == 5
    assert count_parts(boxes((5, 60, 5, 60, red))) == 1
    assert count_parts(boxes((5, 40, 5, 40, red), (50, 54, 50, 54, red))) == 1, "a speck is no second one"
    assert count_parts(boxes((5, 15, 5, 15, red), (15, 30, 14, 16, red))) == 1, "they touch"


def test_sentences_come_for_single_icons_alone_and_say_what_is_so(icons):
    plain, said = (SceneSampler(icons, "train", 4, loose=0.3, sentences=share) for share in (0.0, 1.0))
    changed = 0
    for n in range(300):
        one, other = plain.scene(n), said.scene(n)
        if one.kind != "single":
            assert one == other
            continue
        assert one.layers == other.layers and not is_everyday(other.caption)
        changed += one.caption != other.caption
        icon = icons.icons[other.layers[0].icon]
        facts = dominant_colours(icons.sprites[other.layers[0].icon])
        words = set(other.caption.replace(",", " ").replace(":", " ").split())
        assert words & {*COLOURS, "brown", "black", "gray", "white"} <= {*facts, *icon["concept"].split()}
        assert "20" not in words
    assert changed > 100
    assert any("shape called" in said.scene(n).caption for n in range(300))
    with pytest.raises(ValueError, match=r"sentences must be in \[0, 1\], got -1"):
        SceneSampler(icons, "train", sentences=-1)


def test_a_sentence_needs_no_words():
    rng = np.random.default_rng(0)
    found = {sentence_caption("owl", [], Words(), DrawingFacts((), 1), rng) for _ in range(200)}
    assert len(found) > 15 and all("owl" in text for text in found)
    counted = {sentence_caption("beans", [], Words(), DrawingFacts(("red",), 3), rng) for _ in range(300)}
    assert any("three beans" in text for text in counted)
    assert any("red beans" in text for text in counted)
    felt = {sentence_caption("sad face", ["gloomy"], Words(), DrawingFacts((), 1), rng) for _ in range(200)}
    assert "i feel gloomy" in felt
