"""The index of a folder: loaded again, updated, and never in the folder."""

import json
import time

import pytest
import torch
from conftest import tiny_networks
from PIL import Image

from unclip.clip.model import CLIP
from unclip.clip.search import BATCH, Index, classify

PARTS = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")


@pytest.fixture(scope="module")
def clip() -> CLIP:
    networks = tiny_networks()
    return CLIP(*(networks[n] for n in PARTS))


def put(folder, name: str, colour: tuple[int, int, int]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (40, 30), "white")
    image.paste(colour, (5, 5, 25, 20))
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    for n in range(BATCH + 3):
        put(tmp_path / "images", f"deep/{n}.png", (n * 3 % 256, 255 - n, n * n % 256))
    return tmp_path / "images"


def test_an_image_finds_itself_and_scores_are_cosines(clip, folder, tmp_path):
    index = Index(folder, clip, tmp_path / "cache")
    assert index.search("anything") == [] and index.update() == []
    for n in (0, 17, BATCH + 2):
        image = Image.open(folder / "deep" / f"{n}.png")
        found = index.search(image, top=3)
        assert found[0][1] == f"deep/{n}.png" and found[0][0] == pytest.approx(1, abs=1e-5)
        assert [s for s, _ in found] == sorted((s for s, _ in found), reverse=True)
    score, name = index.search("a star", top=1)[0]
    alone = clip.encode_image(Image.open(folder / name)) @ clip.encode_text("a star").T
    assert score == pytest.approx(alone.item(), abs=1e-5)
    assert len(index.search("a star", top=10_000)) == BATCH + 3


def test_only_what_is_new_is_embedded_and_what_is_gone_is_forgotten(clip, folder, tmp_path, monkeypatch):
    Index(folder, clip, tmp_path / "cache").update()
    embedded = []
    encode = clip.encode_pixels
    monkeypatch.setattr(clip, "encode_pixels", lambda p: (embedded.append(len(p)), encode(p))[1])
    again = Index(folder, clip, tmp_path / "cache")
    assert again.update() == [] and embedded == []
    put(folder, "new.png", (1, 2, 3))
    time.sleep(0.01)
    put(folder, "deep/5.png", (250, 0, 250))
    (folder / "deep" / "6.png").unlink()
    again.update()
    assert embedded == [2] and "deep/6.png" not in again.stamps and len(again.stamps) == BATCH + 3
    whole = Index(folder, clip, tmp_path / "other")
    whole.update()
    assert dict(again.search("a ring", 500)[i][::-1] for i in range(10)).keys() == (
        dict(whole.search("a ring", 500)[i][::-1] for i in range(10)).keys()
    )
    torch.testing.assert_close(
        torch.tensor([s for s, _ in again.search("a ring", 500)]), torch.tensor([s for s, _ in whole.search("a ring", 500)])
    )
    assert not [p for p in folder.rglob("*") if p.suffix not in (".png", "")]


def test_unreadable_files_are_named_and_skipped(clip, folder, tmp_path, caplog):
    (folder / "bad.png").write_bytes(b"no image")
    index = Index(folder, clip, tmp_path / "cache")
    assert index.update() == ["bad.png"] and "bad.png" in caplog.text and len(index.stamps) == BATCH + 3


def test_a_damaged_index_is_rebuilt(clip, folder, tmp_path, caplog):
    index = Index(folder, clip, tmp_path / "cache")
    index.update()
    index.file.write_bytes(index.file.read_bytes()[:100])
    again = Index(folder, clip, tmp_path / "cache")
    assert again.stamps == {} and "is rebuilt" in caplog.text
    again.update()
    assert len(Index(folder, clip, tmp_path / "cache").stamps) == BATCH + 3


def test_classification_ranks_all_labels(clip):
    labels = ["star", "ring", "moon"]
    ranked = classify(clip, Image.new("RGB", (64, 64), "red"), labels)
    assert sorted(label for _, label in ranked) == sorted(labels) and ranked[0][0] >= ranked[-1][0]
    assert [label for _, label in classify(clip, Image.new("RGB", (64, 64), "red"), labels[::-1])] == [n for _, n in ranked]
    with pytest.raises(ValueError, match="labels must be words"):
        classify(clip, Image.new("RGB", (64, 64)), ["star", " "])


def test_the_commands(command, folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, said, _ = command("search", "a star", folder, "--top", "2", "--model", tiny_folder)
    assert code == 0 and len(said.splitlines()) == 2
    score, path = said.splitlines()[0].split("\t")
    assert -1 <= float(score) <= 1 and Image.open(path).size == (40, 30)
    code, said, _ = command("search", path, folder, "--top", "1", "--json", "--model", tiny_folder)
    assert code == 0 and json.loads(said) == {"score": 1.0, "path": path}
    model = ("--model", tiny_folder)
    code, again, error = command("search", path, folder, "--top", "1", "--json", *model, "--force")
    assert code == 0 and again == said and len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    code, said, _ = command("classify", path, "star", "ring", *model)
    assert code == 0 and {line.split("\t")[1] for line in said.splitlines()} == {"star", "ring"}
    (tmp_path / "empty").mkdir()
    code, said, error = command("search", "a star", tmp_path / "empty", "--model", tiny_folder)
    assert code == 0 and said == "" and error.endswith(f"{tmp_path / 'empty'} holds no image that can be read\n")
    for words, message in (
        (["search", "a", tmp_path / "none"], "none is not a folder"),
        (["search", " ", folder], "query is empty"),
        (["search", "a", folder, "--top", "0"], "top must be at least 1, got 0"),
        (["classify", tmp_path / "none.png", "a"], "none.png is not a file"),
        (["classify", path, ""], "labels must be words"),
    ):
        code, said, error = command(*words, "--model", tiny_folder)
        assert code == 2 and said == "" and message in error
