"""The two towers as one encoder."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import CLIP
from unclip.pipelines.stages import encode_image


@pytest.fixture(scope="module")
def clip(tiny_folder) -> CLIP:
    return CLIP.from_pretrained(tiny_folder)


def plain_images(count: int = 3, size: int = 80) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def test_unit_vectors_of_one_space(clip):
    texts, images = clip.encode_text(["a star", "a much longer sentence about two moons"]), clip.encode_image(plain_images())
    assert texts.shape == (2, 32) and images.shape == (3, 32)
    for embeds in (texts, images):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))


def test_batch_equals_one_by_one(clip):
    texts = ["a star", "a much longer sentence about two moons", ""]
    torch.testing.assert_close(clip.encode_text(texts), torch.cat([clip.encode_text(t) for t in texts]))
    images = plain_images()
    torch.testing.assert_close(clip.encode_image(images), torch.cat([clip.encode_image(i) for i in images]))


@pytest.mark.parametrize(("size", "atol"), [(64, 0), (80, 1.5 / 255)])
def test_tensors_are_preprocessed_as_images(clip, size, atol):
    """At the tower's size bitwise; else but for the rounding to 8 bits, where no resized pixel leaves their range."""
    pixels = np.random.default_rng(0).integers(64, 192, (3, size, size, 3), dtype=np.uint8)
    images = list(map(Image.fromarray, pixels))
    tensor = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 for i in images])
    torch.testing.assert_close(clip.preprocess(tensor), clip.preprocess(images), rtol=0, atol=2 * atol)


def test_transparency_is_white(clip):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    torch.testing.assert_close(clip.encode_image(clear), clip.encode_image(Image.new("RGB", (64, 64), "white")))


def test_only_the_middle_of_a_very_long_image_is_encoded(clip, tiny):
    stripe = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 100_000, 3), dtype=np.uint8))
    middle = stripe.crop((50_000 - 16, 0, 50_000 + 16, 2))
    for embed in (clip.encode_image, partial(encode_image, tiny)):  # resized without a crop it would take 80 GB
        torch.testing.assert_close(embed(stripe), embed(middle))
        torch.testing.assert_close(embed(stripe.rotate(90, expand=True)), embed(middle.rotate(90, expand=True)))


def test_the_preprocessor_is_that_of_the_saved_configuration(clip):
    image = plain_images(1, 64)[0]
    stock = clip.feature_extractor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip.preprocess(image), stock)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"\[B, 3, H, W\], got \[3, 64, 64\]"),
        (torch.full((1, 3, 64, 64), 2.0), r"\[0, 1\], got \[2, 2\]"),
        (["bear.png"], "got str"),
    ],
)
def test_bad_images_are_named(clip, images, message):
    with pytest.raises(ValueError, match=message):
        clip.encode_image(images)


@pytest.mark.parametrize("texts", [[], ["a", 3]])
def test_bad_texts_are_named(clip, texts):
    with pytest.raises(ValueError, match="non-empty list of str"):
        clip.encode_text(texts)


def test_saved_equals_loaded(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    assert torch.equal(again.encode_text("a star"), clip.encode_text("a star"))
    assert torch.equal(again.encode_image(plain_images()), clip.encode_image(plain_images()))
