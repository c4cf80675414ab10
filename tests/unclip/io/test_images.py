"""Image files that people have, and that they should not have."""

import io
import json
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from unclip import __version__
from unclip.io.images import (
    IPTC,
    SYNTHETIC,
    UPLOAD_PIXELS,
    cut_out,
    on_white,
    open_image,
    open_upload,
    open_with_metadata,
    png_facts,
    read_facts,
    save_image,
    stated,
)

RED = (200, 30, 40)


def test_every_mode_becomes_rgb(tmp_path):
    plain = Image.new("RGB", (8, 6), RED)
    clear = plain.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    palette = clear.quantize(8)
    files = {
        "rgb.png": plain,
        "rgba.png": clear,
        "p.png": palette,
        "cmyk.jpg": plain.convert("CMYK"),
        "l.png": plain.convert("L"),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        found = open_image(tmp_path / name)
        assert found.mode == "RGB" and found.size == (8, 6)
        corner = np.asarray(found)[0, 0].astype(int)
        if name in ("rgba.png", "p.png"):
            assert corner.min() > 250  # the transparent corner is white, not black
        elif name != "l.png":
            assert np.abs(np.asarray(found)[3, 3].astype(int) - RED).max() < 12
    sixteen = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
    sixteen.save(tmp_path / "16.png")
    found = np.asarray(open_image(tmp_path / "16.png"))
    assert found[0, 0, 0] == 0 and found[-1, -1, 0] == 255 and abs(int(found[4, 0, 0]) - 129) < 3
    assert on_white(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    found = open_image(tmp_path / "turned.png")
    assert found.size == (4, 8) and found.getpixel((3, 0)) == RED


def test_of_an_animation_the_first_frame(tmp_path, caplog):
    frames = [Image.new("RGB", (4, 4), c) for c in (RED, "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((1, 1))[0] > 150 and "first frame" in caplog.text


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_what_cannot_be_read_is_named(tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "PNG")
    files = {
        "empty.png": (b"", "not an image"),
        "text.png": (b"hello", "not an image"),
        "cut.png": (whole.getvalue()[:800], "damaged"),
        "bomb.png": (bomb(11_000, 11_000), "11000x11000 pixels, more than 100 megapixels"),
        "huge.png": (bomb(100_000, 100_000), "more than 100 megapixels"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match="none.png is not a file"):
        open_image(tmp_path / "none.png")


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_a_damaged_upload_is_an_image_or_one_line(kind, data):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(file, kind, exif=Image.Exif())
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.one_of(st.just(b""), st.binary(min_size=1, max_size=4)))
        content[place : place + data.draw(st.integers(0, 4))] = change
        content = content or bytearray(b"x")
    try:
        image = open_upload(bytes(content), "image")
    except ValueError as error:
        assert str(error).startswith("image ") and "\n" not in str(error)
    else:
        assert image.width * image.height <= UPLOAD_PIXELS


def test_a_png_remembers_how_it_was_made_and_another_does_not_pretend(tmp_path):
    facts = {"prompt": "zwei Sterne ☆", "seed": "5"}
    file, plain = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=png_facts(facts))
    assert read_facts(file.getvalue(), "it") == facts | {"version": __version__}
    Image.new("RGB", (8, 8)).save(io.BytesIO(), "PNG", pnginfo=png_facts({"model": "a folder in Latin-1: \udce9"}))
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    with pytest.raises(ValueError, match="it does not say how it was made"):
        read_facts(plain.getvalue(), "it")


def test_a_sticker_looks_on_white_as_before_and_its_surroundings_are_gone():
    large = Image.new("RGB", (512, 512), "white")
    draw = ImageDraw.Draw(large)
    draw.ellipse((100, 60, 420, 440), fill=(200, 30, 40))
    draw.ellipse((200, 160, 300, 260), fill="white")  # the white of an eye
    image = large.resize((128, 128), Image.Resampling.BOX)  # with soft edges
    sticker = cut_out(image)
    alpha = np.array(sticker.getchannel("A"))
    assert alpha[0, 0] == 0 and alpha[:8].max() == 0 and alpha[50, 62] == 255 and alpha[100, 64] == 255
    assert ((alpha > 0) & (alpha < 255)).any()
    before, after = np.array(image).astype(int), np.array(on_white(sticker)).astype(int)
    assert abs(before - after)[alpha > 0].max() <= 3
    assert (before[alpha == 0] >= 255 - 24).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.05, 0.6))
def test_what_is_cut_out_is_what_a_flood_from_the_border_reaches(seed, share):
    dark = np.random.default_rng(seed).random((12, 17)) < share
    image = Image.fromarray(np.where(dark, 0, 255).astype(np.uint8)).convert("RGB")
    reached, waiting = set(), [(y, x) for y in range(12) for x in range(17) if y in (0, 11) or x in (0, 16)]
    while waiting:
        y, x = waiting.pop()
        if 0 <= y < 12 and 0 <= x < 17 and not dark[y, x] and (y, x) not in reached:
            reached.add((y, x))
            waiting += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    alpha = np.array(cut_out(image).getchannel("A"))
    assert all(alpha[y, x] == 0 for y, x in reached) and (alpha[dark] == 255).all()


FACTS = {"prompt": 'a "cat" & <dog>, 🐸', "seed": "0"}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("facts", [None, FACTS])
def test_every_image_says_that_it_is_synthetic(tmp_path, format, facts):
    """IPTC's digital source type in XMP, read as another program would, and the settings only where they were given."""
    file = tmp_path / f"image.{format.lower()}"
    save_image(Image.new("RGB", (16, 16), RED), file, facts, format)
    packet = file.read_bytes()
    start, end = packet.index(b"<x:xmpmeta"), packet.index(b"</x:xmpmeta>") + len(b"</x:xmpmeta>")
    description = ElementTree.fromstring(packet[start:end])[0][0]
    assert description.get(f"{{{IPTC}}}DigitalSourceType") == SYNTHETIC and SYNTHETIC.endswith("/trainedAlgorithmicMedia")
    said = stated(open_with_metadata(file))
    assert said.pop("digital_source_type") == "trainedAlgorithmicMedia"
    assert said == ({} if facts is None else facts | {"version": __version__})


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60))
@settings(max_examples=30)
def test_settings_come_back_from_jpeg_as_they_were(text):
    file = io.BytesIO()
    save_image(Image.new("RGB", (8, 8)), file, {"prompt": text}, "JPEG")
    assert stated(Image.open(file))["prompt"] == text


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format must be PNG, JPEG or WEBP, got 'BMP'"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.bmp", None, "BMP")


def test_inspect(command, tmp_path):
    save_image(Image.new("RGB", (16, 8), RED), tmp_path / "a.png", FACTS)
    code, said, _ = command("inspect", tmp_path / "a.png")
    assert code == 0 and said.splitlines()[:3] == ["format: PNG", "size: 16x8", "digital_source_type: trainedAlgorithmicMedia"]
    assert f"prompt: {FACTS['prompt']}" in said
    Image.new("RGB", (16, 8)).save(tmp_path / "b.jpg")
    code, said, _ = command("inspect", tmp_path / "b.jpg", "--json")
    assert code == 0 and json.loads(said) == {"format": "JPEG", "size": "16x8", "digital_source_type": "not stated"}
    (tmp_path / "c.png").write_text("no image")
    code, _, complaint = command("inspect", tmp_path / "c.png")
    assert code == 2 and len(complaint.strip().splitlines()) == 1
