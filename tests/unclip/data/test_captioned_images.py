"""Folders of captioned images as people have them, and through the real trainer."""

import csv
import io
import json
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from unclip.data.captioned_images import StreamedImages, held_out, to_uint8
from unclip.data.examples import captioned_examples, crop_examples
from unclip.data.image_files import read_captioned_images
from unclip.io.images import square
from unclip.runtime.config import ConfigError, load_config

COUNT = 60


def paint(path, n: int, size=(90, 70)) -> None:
    rng = np.random.default_rng(n)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


def caption(n: int) -> str:
    return f"a {['red', 'blue', 'green'][n % 3]} thing number {n}"


@pytest.fixture(params=["txt", "jsonl", "csv", "parquet", "tar", "tar with json"])
def folder(request, tmp_path):
    """The same captioned images in each of the ways that are read."""
    path = tmp_path / request.param
    names = [f"{'deep/' if n % 2 else ''}{n:03d}.png" for n in range(COUNT)]
    for n, name in enumerate(names):
        paint(path / name, n)
    rows = [{"file_name": name, "text": caption(n)} for n, name in enumerate(names)]
    if request.param == "txt":
        for n, name in enumerate(names):
            (path / name).with_suffix(".txt").write_text(caption(n) + "\n")
    elif request.param == "jsonl":
        (path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif request.param == "csv":
        with open(path / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif request.param.startswith("tar"):
        source, path = path, tmp_path / "shards"
        path.mkdir()
        for shard in range(3):
            with tarfile.open(path / f"{shard}.tar", "w") as tar:
                for n in range(shard, COUNT, 3):
                    tar.add(source / names[n], f"{n:06d}.png")
                    kind, said = (
                        (".json", json.dumps({"text": caption(n)})) if "json" in request.param else (".txt", caption(n))
                    )
                    facts = tarfile.TarInfo(f"{n:06d}{kind}")
                    facts.size = len(said)
                    tar.addfile(facts, io.BytesIO(said.encode()))
    else:
        from datasets import Dataset

        images = [{"bytes": (path / name).read_bytes(), "path": None} for name in names]
        source, path = path, tmp_path / "rows"
        path.mkdir()
        Dataset.from_dict({"image": images, "text": [r["text"] for r in rows]}).to_parquet(path / "0.parquet")
        assert source.is_dir()
    return path


def test_every_layout_gives_every_image_its_own_caption(folder):
    found = read_captioned_images(folder)
    assert sorted(found.captions) == sorted(caption(n) for n in range(COUNT))
    for row in (0, 7, COUNT - 1):
        n = int(found.captions[row].split()[-1])
        expected = np.random.default_rng(n).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        np.testing.assert_array_equal(np.asarray(found.open(row)), expected)


def test_the_emoji_configurations_take_ones_own_images(folder):
    """What they say of how scenes are composed is nothing that a folder has."""
    for name in ("prior", "decoder"):
        composed = load_config(f"emoji/{name}")["data"]
        assert composed["all_concepts"] and composed["groups"]
        for split in ("train", "validation"):
            own = {"path": str(folder)}
            assert captioned_examples(composed | own, split)[0]["caption"] == captioned_examples(own, split)[0]["caption"]


def test_an_epoch_has_every_training_image_once_and_no_held_out_one(folder):
    train, validation = captioned_examples({"path": str(folder)}), captioned_examples({"path": str(folder)}, "validation")
    names = train.source.files.names
    count = sum(not held_out(n) for n in names)
    assert 0 < COUNT - count < COUNT / 3
    epochs = [[train[i]["caption"] for i in range(e * count, (e + 1) * count)] for e in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == count
    kept = {validation[i]["caption"] for i in range(2 * COUNT)}
    assert not kept & set(epochs[0]) and len(kept) == COUNT - count
    again = captioned_examples({"path": str(folder)})
    for i in (3, count + 1):
        one, two = train[i], again[i]
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["random"], two["random"])
        assert one["image"].shape == (3, 64, 64) and one["image"].dtype == torch.uint8 and one["caption"] == two["caption"]


def test_crops_are_of_the_sharp_image_and_small_ones_are_skipped(tmp_path, caplog):
    for n in range(4):
        paint(tmp_path / f"{n}.png", n, (300, 260) if n else (100, 100))
        (tmp_path / f"{n}.txt").write_text(caption(n))
    crops = crop_examples({"path": str(tmp_path), "crop": 0.25}, 256)
    for i in range(8):
        assert crops[i]["image"].shape == (3, 64, 64)
    assert "1 images are skipped: they have less than 256 pixels a side" in caplog.text
    assert crop_examples({"path": str(tmp_path)}, 256, "validation")[0]["image"].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="no image has 1024 pixels a side"):
        crop_examples({"path": str(tmp_path)}, 1024)


def test_images_that_do_not_open_are_named_and_skipped_up_to_a_limit(tmp_path, caplog):
    for n in range(6):
        paint(tmp_path / f"{n}.png", n)
        (tmp_path / f"{n}.txt").write_text(caption(n))
    for n in (1, 4):
        (tmp_path / f"{n}.png").write_bytes(b"broken")
    data = captioned_examples({"path": str(tmp_path)})
    assert {data[i]["caption"] for i in range(12)} == {caption(n) for n in (0, 2, 3, 5)}
    assert "1.png is not an image" in caplog.text and "skipped, 2 so far" in caplog.text
    strict = captioned_examples({"path": str(tmp_path), "max_unreadable": 1})
    with pytest.raises(ValueError, match="2 images could not be read, the last: .*png is not an image"):
        for i in range(12):
            strict[i]


def test_held_out_ones_that_do_not_open_are_skipped_too(tmp_path):
    for n in range(COUNT):
        paint(tmp_path / f"{n}.png", n)
        (tmp_path / f"{n}.txt").write_text(caption(n))
    before = captioned_examples({"path": str(tmp_path)}, "validation").source.first(COUNT)
    broken = next(n for n in range(COUNT) if caption(n) == before[0].caption)
    (tmp_path / f"{broken}.png").write_bytes(b"broken")
    after = captioned_examples({"path": str(tmp_path)}, "validation").source.first(COUNT)
    assert [o.caption for o in after] == [o.caption for o in before[1:]]


def test_an_unreadable_image_in_a_data_worker_gives_one_line(tmp_path, command):
    for n in range(8):
        paint(tmp_path / f"{n}.png", n, (300, 300))
        (tmp_path / f"{n}.png").write_bytes((tmp_path / f"{n}.png").read_bytes()[:200])
        (tmp_path / f"{n}.txt").write_text(caption(n))
    settings = (f"data.path={tmp_path}", "data.max_unreadable=2", "workers=1", f"output_dir={tmp_path / 'run'}")
    code, _, said = command("train", "tiny/decoder", "objective.clip=emoji", *settings)
    assert code == 2 and said.splitlines()[-1].startswith("error: 3 images could not be read, the last: ")
    assert not multiprocessing.active_children(), "Python would wait for it for ever"


def test_workers_that_are_not_forked_read_the_same(folder):
    """They are given the examples pickled, as on macOS."""
    train = captioned_examples({"path": str(folder)})
    again = pickle.loads(pickle.dumps(train))
    for i in (0, COUNT):
        assert again[i]["caption"] == train[i]["caption"] and torch.equal(again[i]["image"], train[i]["image"])


def test_a_table_that_begins_with_a_byte_order_mark(tmp_path):
    paint(tmp_path / "a.png", 1)
    (tmp_path / "metadata.csv").write_text('file_name,text\r\na.png,"an Öl lamp,\nlit"\r\n', encoding="utf-8-sig", newline="")
    found = read_captioned_images(tmp_path)
    assert found.names == ["a.png"] and found.captions == ["an Öl lamp,\nlit"]


def test_what_is_missing_is_named(tmp_path):
    def refuses(message: str, error=ValueError, **data) -> None:
        with pytest.raises(error, match=message):
            captioned_examples({"path": str(tmp_path / "pictures"), **data})

    refuses("is not a folder; name one with captioned images, or run", FileNotFoundError)
    (tmp_path / "pictures").mkdir()
    refuses("holds no images", FileNotFoundError)
    paint(tmp_path / "pictures" / "a.png", 1)
    refuses("a.png has no caption: a.txt is missing")
    (tmp_path / "pictures" / "a.txt").write_text(" \n")
    refuses("a.png has no caption: a.txt is empty")
    (tmp_path / "pictures" / "a.txt").write_bytes("ein Öl".encode("latin-1"))
    refuses("a.txt is not UTF-8: byte 4 is 0xd6")
    metadata = tmp_path / "pictures" / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "label": "cat"}\n')
    refuses("row 1: a.png has no 'text'; columns: file_name, label")
    captioned_examples({"path": str(tmp_path / "pictures"), "caption_column": "label"})
    metadata.write_text('{"file_name": "b.png", "text": "cat"}\n')
    refuses("row 1: .*b.png is not a file")
    metadata.write_text("{oops\n")
    refuses("line 1 is not JSON")
    metadata.write_text('\n["a.png", "cat"]\n')
    refuses("line 2 is no JSON object: ..a.png")
    metadata.write_bytes('{"file_name": "a.png", "text": "Öl"}'.encode("latin-1"))
    refuses("metadata.jsonl is not UTF-8: byte 32 is 0xd6")
    metadata.write_text('{"text": "cat"}\n')
    refuses("row 1: there is no file_name")
    with pytest.raises(ConfigError, match="data.path is missing"):
        captioned_examples({})
    with pytest.raises(ConfigError, match="unknown key data.captoin_column .did you mean .caption_column."):
        captioned_examples({"path": str(tmp_path / "pictures"), "captoin_column": "x"})


@pytest.fixture
def repository(tmp_path):
    """The folder of a Hub dataset: two shards of training, one that its makers held out."""
    from datasets import Dataset

    folder = tmp_path / "repository"
    for split, rows in (("train-0", range(20)), ("train-1", range(20, 40)), ("validation-0", range(40, 46))):
        for n in rows:
            paint(tmp_path / f"{n}.png", n)
        images = [{"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None} for n in rows]
        found = Dataset.from_dict({"photo": images, "words": [caption(n) for n in rows]})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        found.to_parquet(folder / "data" / f"{split}.parquet")
    return {"path": f"hub:{folder}", "image_column": "photo", "caption_column": "words"}


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hub_dataset_by_its_columns(repository, streaming, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = repository | {"streaming": streaming}
    train, validation = captioned_examples(data), captioned_examples(data, "validation")
    epochs = [[train[i] for i in range(e * 40, (e + 1) * 40)] for e in range(2)]
    said = [[item["caption"] for item in epoch] for epoch in epochs]
    assert sorted(said[0]) == sorted(said[1]) == sorted(caption(n) for n in range(40))
    assert said[0] != said[1] and said[0] != [caption(n) for n in range(40)]
    n = int(said[0][5].split()[-1])
    paint(tmp_path / "again.png", n)
    assert torch.equal(epochs[0][5]["image"], to_uint8(square(Image.open(tmp_path / "again.png"), 64)))
    assert {validation[i]["caption"] for i in range(12)} == {caption(n) for n in range(40, 46)}
    again = captioned_examples(data)
    again = pickle.loads(pickle.dumps(again))
    for i in (33, 3, 47):  # any order, also backwards
        one, two = again[i], epochs[i // 40][i % 40]
        assert one["caption"] == two["caption"] and torch.equal(one["image"], two["image"])
    assert captioned_examples(data | {"size": 32})[0]["image"].shape == (3, 32, 32)
    with pytest.raises((ValueError, ConfigError), match="has no column 'text'; columns: photo, words"):
        captioned_examples({"path": data["path"], "streaming": streaming, "image_column": "photo"})
    with pytest.raises((ValueError, ConfigError), match="the dataset 'nobody/nothing' could not be loaded"):
        captioned_examples({"path": "hub:nobody/nothing", "streaming": streaming})


def test_a_stream_skips_what_does_not_open_and_is_for_the_hub(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # five seconds for each end of a stream
    for n in range(6):
        paint(tmp_path / f"{n}.png", n)
    images = [{"bytes": b"broken" if n in (1, 4) else (tmp_path / f"{n}.png").read_bytes(), "path": None} for n in range(6)]
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"image": images, "text": [caption(n) for n in range(6)]}).to_parquet(tmp_path / "set" / "train.parquet")
    Dataset.from_dict({"image": images[:1], "text": [caption(0)]}).to_parquet(tmp_path / "set" / "test.parquet")
    data = {"path": f"hub:{tmp_path / 'set'}", "streaming": True}
    stream = captioned_examples(data)
    first = [stream[i]["caption"] for i in range(12)]
    assert set(first) == {caption(n) for n in (0, 2, 3, 5)}
    assert [captioned_examples(data)[i]["caption"] for i in (7,)] == first[7:8]
    strict = captioned_examples(data | {"max_unreadable": 1})
    with pytest.raises(ValueError, match="2 images could not be read"):
        for i in range(12):
            strict[i]
    paint(tmp_path / "large.png", 7, (300, 300))
    images[2] = {"bytes": (tmp_path / "large.png").read_bytes(), "path": None}
    Dataset.from_dict({"image": images, "text": [caption(n) for n in range(6)]}).to_parquet(tmp_path / "set" / "train.parquet")
    large = StreamedImages(str(tmp_path / "set"), "train", 0, 100, min_side=256)
    assert {large.open(i).caption for i in range(12)} == {caption(2)} and len(large.unreadable.names) == 2, (
        "small ones don't count"
    )
    with pytest.raises((ValueError, ConfigError), match="data.streaming is for Hub datasets"):
        captioned_examples({"path": str(tmp_path), "streaming": True})


def test_shards_that_lack_a_caption_or_are_cut_off_are_named(tmp_path):
    paint(tmp_path / "a.png", 1)
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "deep/0001.png")
    with pytest.raises(
        (ValueError, ConfigError), match=r"0.tar: deep/0001.png has no caption: no deep/0001.txt, nor 'text' in"
    ):
        captioned_examples({"path": str(tmp_path / "set")})
    (tmp_path / "set" / "0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises((ValueError, ConfigError), match="0.tar is damaged"):
        captioned_examples({"path": str(tmp_path / "set" / "0.tar")})


def test_ones_own_images_through_all_five_stages_to_a_sample(command, tmp_path):
    """As the README says it: train on a folder, put the stages together, draw."""
    for n in range(24):
        paint(tmp_path / "mine" / f"{n}.png", n, (280, 270) if n % 4 else (1040, 1030))
        (tmp_path / "mine" / f"{n}.txt").write_text(caption(n))

    def unclip(*words) -> None:
        code, _, error = command(*words)
        assert code == 0, error

    runs = []
    for stage in ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024"):
        words = [f"data.path={tmp_path / 'mine'}", f"output_dir={tmp_path / stage}", "max_steps=2", "validate_every=2"]
        words += [f"objective.clip={tmp_path / 'clip'}"] if stage in ("prior", "decoder") else []
        unclip("train", ROOT / f"configs/tiny/{stage}.yaml", *words, "batch_size=4", "sample_every=0", "log_every=1")
        runs.append(tmp_path / stage)
    row = [json.loads(line) for line in (tmp_path / "clip" / "log.jsonl").read_text().splitlines()][-1]
    assert row["kind"] == "validation" and 0 <= row["held_out_r1"] <= row["held_out_r5"] <= 1
    unclip("export", *runs, tmp_path / "model")
    unclip("generate", "a red thing", "--model", tmp_path / "model", "--out", tmp_path / "red.png", "--size", "64")
    assert Image.open(tmp_path / "red.png").size == (64, 64)
