"""Emoji in a prompt are read as their names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclip.clip.characters import names, read_characters
from unclip.clip.model import CLIP
from unclip.pipelines.stages.text import encode_texts

VARIANT = "\ufe0f"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("🐱", "cat face"),
        ("🐱👑", "cat face crown"),
        ("a 🐱, please", "a cat face, please"),
        ("❤️ and ❤", "red heart and red heart"),
        ("👍🏽!", "thumbs up with medium skin!"),
        ("👨🏿\u200d🍳", "man cook with dark skin"),
        ("🐈\u200d⬛ and 🐈", "black cat and cat"),
        ("🐈\u200d🚀", "cat rocket"),
        ("a café", "a café"),
        ("two\ncats  ", "two\ncats  "),
    ],
)
def test_emoji_are_read_as_names(text, read):
    assert read_characters(text) == read


def test_every_emoji_is_replaced_completely():
    assert len(names()) == len(set(names().values())) > 1900
    for emoji, name in names().items():
        assert read_characters(emoji) == read_characters(emoji[0] + VARIANT + emoji[1:]) == name
        assert read_characters(f"my {emoji}, {emoji}") == f"my {name}, {name}"


@given(st.text(st.characters(max_codepoint=0x2FF, exclude_characters="©®")))
def test_other_text_is_left_alone(text):
    assert read_characters(text) == text


def test_a_clip_reads_them_so(tiny_folder):
    clip = CLIP.from_pretrained(tiny_folder)
    emoji, name = (clip.tokenize([text])["input_ids"] for text in ("a 🐱 with 👑", "a cat face with crown"))
    assert (emoji == name).all()


def test_a_pipeline_reads_them_so(tiny):
    emoji, name = (encode_texts(tiny, [text]) for text in ("a 🐱 with 👑", "a cat face with crown"))
    assert all((a == b).all() for a, b in zip(emoji, name, strict=True))
