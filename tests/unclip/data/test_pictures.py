"""Folders of captioned pictures as people have them, and through the real trainer."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from unclip.config import ConfigError
from unclip.data.examples import captioned_examples, crop_examples
from unclip.data.pictures import held_out
from unclip.data.reading import read_pictures

COUNT = 60


def paint(path, n: int, size=(90, 70)) -> None:
    rng = np.random.default_rng(n)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


def caption(n: int) -> str:
    return f"a {['red', 'blue', 'green'][n % 3]} thing number {n}"


@pytest.fixture(params=["txt", "jsonl", "csv", "parquet"])
def folder(request, tmp_path):
    """The same captioned pictures in each of the ways that are read."""
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
    else:
        from datasets import Dataset

        pictures = [{"bytes": (path / name).read_bytes(), "path": None} for name in names]
        source, path = path, tmp_path / "rows"
        path.mkdir()
        Dataset.from_dict({"image": pictures, "text": [r["text"] for r in rows]}).to_parquet(path / "0.parquet")
        assert source.is_dir()
    return path


def test_every_layout_gives_every_picture_its_own_caption(folder):
    found = read_pictures(folder)
    assert sorted(found.captions) == sorted(caption(n) for n in range(COUNT))
    for row in (0, 7, COUNT - 1):
        n = int(found.captions[row].split()[-1])
        expected = np.random.default_rng(n).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        np.testing.assert_array_equal(np.asarray(found.open(row)), expected)


def test_an_epoch_has_every_training_picture_once_and_no_held_out_one(folder):
    train, validation = captioned_examples({"path": str(folder)}), captioned_examples({"path": str(folder)}, "validation")
    names = train.source.pictures.names
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


def test_crops_are_of_the_sharp_picture_and_small_ones_are_skipped(tmp_path, caplog):
    for n in range(4):
        paint(tmp_path / f"{n}.png", n, (300, 260) if n else (100, 100))
        (tmp_path / f"{n}.txt").write_text(caption(n))
    crops = crop_examples({"path": str(tmp_path), "crop": 0.25}, 256)
    for i in range(8):
        assert crops[i]["image"].shape == (3, 64, 64)
    assert "1 pictures are skipped: they have less than 256 pixels a side" in caplog.text
    assert crop_examples({"path": str(tmp_path)}, 256, "validation")[0]["image"].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="no picture of .* has 1024 pixels a side"):
        crop_examples({"path": str(tmp_path)}, 1024)


def test_pictures_that_do_not_open_are_named_and_skipped_up_to_a_limit(tmp_path, caplog):
    for n in range(6):
        paint(tmp_path / f"{n}.png", n)
        (tmp_path / f"{n}.txt").write_text(caption(n))
    for n in (1, 4):
        (tmp_path / f"{n}.png").write_bytes(b"broken")
    data = captioned_examples({"path": str(tmp_path)})
    assert {data[i]["caption"] for i in range(12)} == {caption(n) for n in (0, 2, 3, 5)}
    assert "1.png is no picture" in caplog.text and "skipped, 2 so far" in caplog.text
    strict = captioned_examples({"path": str(tmp_path), "max_unreadable": 1})
    with pytest.raises(ValueError, match="2 pictures could not be read, the last: .*png is no picture"):
        for i in range(12):
            strict[i]


def test_what_is_missing_is_named(tmp_path):
    def refuses(message: str, error=ValueError, **data) -> None:
        with pytest.raises(error, match=message):
            captioned_examples({"path": str(tmp_path / "pictures"), **data})

    refuses("is not a folder; name one with captioned pictures, or run", FileNotFoundError)
    (tmp_path / "pictures").mkdir()
    refuses("holds no pictures", FileNotFoundError)
    paint(tmp_path / "pictures" / "a.png", 1)
    refuses("a.png has no caption: a.txt is missing")
    (tmp_path / "pictures" / "a.txt").write_text(" \n")
    refuses("a.png has no caption: a.txt is empty")
    metadata = tmp_path / "pictures" / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "label": "cat"}\n')
    refuses("row 1: a.png has no 'text'; columns: file_name, label")
    captioned_examples({"path": str(tmp_path / "pictures"), "caption_column": "label"})
    metadata.write_text('{"file_name": "b.png", "text": "cat"}\n')
    refuses("row 1: .*b.png is not a file")
    metadata.write_text("{oops\n")
    refuses("line 1 is not JSON")
    metadata.write_text('{"text": "cat"}\n')
    refuses("row 1: there is no file_name")
    with pytest.raises(ConfigError, match="data.path is missing"):
        captioned_examples({})
    with pytest.raises(ConfigError, match="unknown key data.captoin_column .did you mean .caption_column."):
        captioned_examples({"path": str(tmp_path / "pictures"), "captoin_column": "x"})


def test_ones_own_pictures_through_all_five_stages_to_a_sample(tmp_path):
    """As the README says it: train on a folder, put the stages together, draw."""
    for n in range(24):
        paint(tmp_path / "mine" / f"{n}.png", n, (280, 270) if n % 4 else (1040, 1030))
        (tmp_path / "mine" / f"{n}.txt").write_text(caption(n))

    def unclip(*words) -> str:
        command = [sys.executable, "-m", "unclip", *map(str, words)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stderr

    runs = []
    for stage in ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024"):
        words = [f"data.path={tmp_path / 'mine'}", f"output_dir={tmp_path / stage}", "max_steps=2", "validate_every=2"]
        words += [f"objective.clip={tmp_path / 'clip'}"] if stage in ("prior", "decoder") else []
        unclip("train", f"configs/tiny/{stage}.yaml", *words, "batch_size=4", "sample_every=0", "log_every=1")
        runs.append(tmp_path / stage)
    row = [json.loads(line) for line in (tmp_path / "clip" / "log.jsonl").read_text().splitlines()][-1]
    assert row["kind"] == "validation" and 0 <= row["held_out_r1"] <= row["held_out_r5"] <= 1
    unclip("export", *runs, tmp_path / "model")
    unclip("generate", "a red thing", "--model", tmp_path / "model", "--out", tmp_path / "red.png", "--size", "64")
    assert Image.open(tmp_path / "red.png").size == (64, 64)
