"""`unclip generate --prompts`: killed and resumed, or divided over processes, it draws what one run draws."""

import json

import numpy as np
import pytest
from conftest import TWO_PROCESSES
from PIL import Image
from running import kill, launch

PROMPTS = ["a ring", "two stars", "", "a red moon", "a ring"]
SETTINGS = ["--size", "64", "--steps", "2", "--dtype", "fp32"]


@pytest.fixture
def words(tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["generate", "--prompts", tmp_path / "prompts.txt", "--model", tiny_folder, "--num-images", "2", *SETTINGS]


def pixels(folder) -> dict[str, np.ndarray]:
    return {p.name: np.array(Image.open(p), dtype=int) for p in sorted(folder.glob("*.png"))}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Batches of another size round otherwise, in float32 and in random networks by up to a hundredth."""
    return a.keys() == b.keys() and all(abs(a[n] - b[n]).max() <= 3 for n in a)


def test_a_file_of_prompts(command, words, tmp_path):
    out = tmp_path / "out"
    code, said, _ = command(*words, "--out", out)
    names = [
        f"00000{n}-{slug}.png"
        for n, slug in enumerate(["a-ring"] * 2 + ["two-stars"] * 2 + ["a-red-moon"] * 2 + ["a-ring"] * 2)
    ]
    assert code == 0 and said.split() == [str(out / n) for n in names]
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [r["file"] for r in rows] == names and [r["seed"] for r in rows] == ["0", "1"] * 4
    assert rows[2]["prompt"] == "two stars" and json.loads(rows[0]["settings"])["size"] == 64
    drawn = pixels(out)
    assert abs(drawn[names[0]] - drawn[names[6]]).max() <= 3 < abs(drawn[names[0]] - drawn[names[1]]).max()

    # what is lost is drawn again, what is there stays untouched
    before = {n: (out / n).stat().st_mtime_ns for n in names}
    (out / names[3]).unlink()
    code, _, error = command(*words, "--out", out)
    assert code == 0 and "7 of 8 images are there already" in error and same(pixels(out), drawn)
    assert [n for n in names if (out / n).stat().st_mtime_ns != before[n]] == [names[3]]

    code, _, error = command(*words, "--out", out, "--steps", "3")
    assert code == 2 and "was made with another settings" in error and same(pixels(out), drawn)
    (out / names[0]).write_bytes((out / names[0]).read_bytes()[:200])
    code, _, error = command(*words, "--out", out)
    assert code == 2 and f"{names[0]} is no complete image" in error
    assert command(*words, "--out", out, "--force")[0] == 0 and same(pixels(out), drawn)


def test_killed_and_on_two_processes(words, tmp_path, command, run):
    assert command(*words, "--out", tmp_path / "whole")[0] == 0
    for attempt in range(10):  # the eight images are written within milliseconds: now and then the signal comes too late
        out = tmp_path / f"out{attempt}"
        arguments = ["-m", "unclip", *map(str, words), "--out", str(out)]
        kill(launch(arguments, 1), lambda folder=out: any(folder.glob("*.png")))
        kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.png")}
        if len(kept) < 8:
            break
    assert 0 < len(kept) < 8 and not (out / "manifest.jsonl").exists()
    second = run(*TWO_PROCESSES, *arguments, timeout=240)
    assert second.returncode == 0, second.stderr
    left = [n for n in range(8) if not any(name.startswith(f"{n:06d}") for name in kept)]
    drawn_by_the_first = sum(n % 2 == 0 for n in left)
    assert f"{drawn_by_the_first}/{drawn_by_the_first}" in second.stderr, "each process draws its share, and no more"
    assert same(pixels(out), pixels(tmp_path / "whole"))
    assert (out / "manifest.jsonl").read_text() == (tmp_path / "whole" / "manifest.jsonl").read_text()
    assert {n: (out / n).stat().st_mtime_ns for n in kept} == kept


def test_a_folder_may_have_a_dot_in_its_name(command, words, tmp_path):
    (tmp_path / "v1.5").mkdir()
    assert command(*words, "--out", tmp_path / "v1.5")[0] == 0
    assert (tmp_path / "v1.5" / "manifest.jsonl").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--out", "one.png"], "--prompts needs a folder to draw into: --out DIR, got one.png"),
        ([], "--out DIR, got None"),
        (["a ring", "--out", "o"], "not both"),
        (["--prompts", "none.txt", "--out", "o"], "cannot read none.txt: No such file"),
        (["--prompts", "blank.txt", "--out", "o"], "blank.txt holds no prompts"),
        (["--prompts", "image.txt", "--out", "o"], "image.txt is no text in UTF-8"),
    ],
)
def test_bad_input(command, words, tmp_path, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff")
    code, said, error = command(*words, *extra)
    assert code == 2 and said == "" and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()
