"""`unclip variations`, `interpolate` and `edit`, in a process of the tests over the toy model."""

import hashlib
import shutil

import pytest
from PIL import Image


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "cat.png"
    image = Image.new("RGB", (90, 70), "white")
    image.paste((200, 60, 40), (10, 10, 50, 40))
    image.save(path)
    return path


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_variations(command, image, tiny_folder, tmp_path):
    before = digest(image)
    words = ["variations", image, "--out", tmp_path / "out", "-n", "2", "--size", "64", "--model", tiny_folder]
    code, said, _ = command(*words, "--seed", "5")
    files = [tmp_path / "out" / f"cat-{n}.png" for n in (5, 6)]
    assert code == 0 and said.split() == [str(f) for f in files]
    first, second = (Image.open(f) for f in files)
    assert first.size == (64, 64) and first.tobytes() != second.tobytes()
    assert first.text["seed"] == "5" and first.text["variation_of"] == "cat.png"
    code, said, error = command(*words, "--seed", "5")
    assert code == 2 and said == "" and error.endswith("pass --force to overwrite it\n")
    code, _, _ = command(*words, "--seed", "6", "--eta", "0", "--decoder-steps", "4", "--force", "--prompt", "a star")
    again = [Image.open(tmp_path / "out" / f"cat-{n}.png") for n in (6, 7)]
    assert code == 0 and again[0].tobytes() == again[1].tobytes() and again[0].text["eta"] == "0.0"
    assert digest(image) == before


def test_interpolate(command, image, tiny_folder, tmp_path):
    out = tmp_path / "path"
    code, said, _ = command(
        "interpolate", image, "two rings", "--out", out, "--steps", "3", "--size", "64", "--model", tiny_folder
    )
    assert code == 0 and said.split() == [str(out / n) for n in ("000.png", "001.png", "002.png", "grid.png", "path.webp")]
    assert Image.open(out / "grid.png").size == (192, 64)
    assert Image.open(out / "path.webp").n_frames == 4 and Image.open(out / "path.webp").is_animated
    assert Image.open(out / "001.png").text["share"] == "0.5000"
    assert sorted(p.name for p in out.iterdir()) == ["000.png", "001.png", "002.png", "grid.png", "path.webp"]


def test_edit(command, image, tiny_folder, tmp_path):
    words = [
        "edit",
        image,
        "--from",
        "a cat",
        "--to",
        "a black cat",
        "--size",
        "64",
        "--decoder-steps",
        "3",
        "--model",
        tiny_folder,
    ]
    code, said, _ = command(*words, "--out", tmp_path / "new.png")
    assert code == 0 and said == f"{tmp_path / 'new.png'}\n" and Image.open(tmp_path / "new.png").text["to"] == "a black cat"
    code, said, _ = command(*words, "--out", tmp_path / "several", "--strength", "0", "--strength", "0.4")
    assert code == 0 and [p.name for p in sorted((tmp_path / "several").iterdir())] == ["cat-0.4.png", "cat-0.png"]


def test_pca(command, image, tiny_folder, tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    for n in range(6):
        Image.new("RGB", (32, 32), (40 * n, 250 - 30 * n, n * n)).save(images / f"{n}.png")
    words = ["pca", image, "--size", "64", "--model", tiny_folder]
    axes, out = tmp_path / "axes.safetensors", tmp_path / "out"
    code, said, _ = command(*words, "--out", out, "--of", images, "--save-axes", axes)
    names = [f"{k:03d}.png" for k in (0, 5)] + ["grid.png"]
    assert code == 0 and said.split() == [*(str(out / n) for n in names), str(axes)]
    assert Image.open(out / "grid.png").size == (128, 64) and Image.open(out / "005.png").text["components"] == "5"
    code, _, error = command(*words, "--out", tmp_path / "none")
    assert code == 2 and "has no principal axes of its own; name images with --of FOLDER" in error
    own = shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(axes, own / "image_components.safetensors")
    again = [*words[:-1], own, "-k", "5", "--out", tmp_path / "again"]
    assert command(*again)[0] == 0
    assert Image.open(tmp_path / "again" / "005.png").tobytes() != Image.open(out / "000.png").tobytes()
    code, _, error = command(*again, "-k", "6", "--force")
    assert code == 2 and "0 to 5 principal components to keep, got 6" in error


def test_inpaint_and_outpaint(command, image, tiny_folder, tmp_path):
    mask = Image.new("L", (90, 70), 0)
    mask.paste(255, (50, 0, 90, 70))
    mask.save(tmp_path / "mask.png")
    settings = ["--size", "64", "--decoder-steps", "2", "--model", tiny_folder]
    code, said, _ = command("inpaint", image, tmp_path / "mask.png", "a star", "--out", tmp_path / "in.png", *settings)
    assert code == 0 and said == f"{tmp_path / 'in.png'}\n"
    drawn = Image.open(tmp_path / "in.png")
    assert drawn.size == (72, 56) and drawn.text["prompt"] == "a star"
    code, _, _ = command("outpaint", image, "a star", "--out", tmp_path / "out.png", *settings)
    assert code == 0 and Image.open(tmp_path / "out.png").text["margins"] == "(22, 22, 17, 17)"
    code, _, _ = command("outpaint", image, "a star", "--left", "90", "--out", tmp_path / "wide.png", *settings)
    assert code == 0 and Image.open(tmp_path / "wide.png").size == (104, 40)


BAD = [
    (["inpaint", "{image}", "{image}", " ", "--out", "o.png"], "prompt is empty"),
    (["outpaint", "{image}", "a", "--left", "-2", "--out", "o.png"], "got left -2"),
    (["variations", "none.png", "--out", "o"], "none.png is not a file"),
    (["variations", "{image}", "--out", "o", "-n", "0"], "got 0"),
    (["variations", "{image}", "--out", "o", "--eta", "-1"], "eta must be from 0 to 1, got -1.0"),
    (["variations", "{text}", "--out", "o"], "notes.png is not an image that can be read"),
    (["interpolate", "a cat", "dog.png", "--out", "o"], "dog.png is not a file"),
    (["interpolate", "a cat", "a dog", "--out", "o", "--steps", "1"], "steps must be from 2 to 1000, got 1"),
    (["interpolate", "a cat", "", "--out", "o"], "an end is an empty sentence"),
    (["interpolate", "a cat", "a dog", "--out", "o", "--noise", "pink"], "'pink'"),
    (["edit", "{image}", "--from", "a", "--to", "a", "--out", "o.png"], "the same sentence, 'a'"),
    (["edit", "{image}", "--to", "a", "--out", "o.jpg"], "o.jpg must end in .png or be a folder"),
    (["edit", "{image}", "--to", "a", "--out", "o.png", "--strength", "3"], "strength must be from 0 to 1, got [3.0]"),
]


@pytest.mark.parametrize("case", BAD, ids=[m for _, m in BAD])
def test_a_mistake_is_one_line(command, image, tiny_folder, tmp_path, monkeypatch, case):
    words, message = case
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("hello")
    words = [w.format(image=image, text=tmp_path / "notes.png") for w in words]
    code, said, error = command(*words, "--model", tiny_folder, "--size", "64")
    assert code == 2 and said == "" and message in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error and not list(tmp_path.glob("o*.png"))
