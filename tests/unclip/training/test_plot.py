"""Loss curves."""

import json

import numpy as np
import pytest
from PIL import Image

from unclip.training.plot import _name, read_log


def log(folder, name: str, offset: float = 0.0):
    run = folder / name
    run.mkdir(parents=True)
    rows = []
    for step in range(1, 41):
        loss = {"loss": 1 / step + offset + 0.01} | {f"t{n}": (4 - n) / step + 0.01 for n in range(4)}
        rows.append({"kind": "train", "step": step, "samples": 8 * step, "rate": 1e-3, "images_per_s": 9.0, **loss})
        if step % 10 == 0:
            rows.append({"kind": "validation", "step": step, "samples": 8 * step, "cosine": 0.5 + step / 100, **loss})
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return run


def colours(path) -> int:
    return len(np.unique(np.array(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_curves_of_a_run_and_of_several(tmp_path, command):
    one, two = log(tmp_path, "one"), log(tmp_path, "two", 0.5)
    code, out, _ = command("plot", one)
    assert code == 0 and out.strip() == str(one / "curves.png")
    both = tmp_path / "both.png"
    assert command("plot", one, two, "--out", both)[0] == 0
    single, several = Image.open(one / "curves.png"), Image.open(both)
    assert single.width > 1000 and several.height > single.height  # a panel of levels for each run
    assert colours(both) > 50
    code, _, said = command("plot", one, two, "--out", both)
    assert code == 2 and "both.png exists; pass --force" in said


def test_runs_are_told_apart_by_what_stands_above_them(tmp_path):
    runs = [tmp_path / name for name in ("a/x/run", "b/x/run", "b/y/run", "b/y/other")]
    assert [_name(run, runs) for run in runs] == ["a/x/run", "b/x/run", "y/run", "other"]
    assert _name(runs[0], [runs[0], runs[0]]) == "run"


def test_a_step_logged_twice_counts_once_and_a_cut_line_is_left_out(tmp_path):
    run = log(tmp_path, "run")
    path = run / "log.jsonl"
    path.write_text(
        path.read_text() + json.dumps({"kind": "train", "step": 40, "samples": 320, "loss": 9.0}) + '\n{"kind": "tr'
    )
    rows = read_log(run)["train"]
    assert [r["step"] for r in rows] == list(range(1, 41)) and rows[-1]["loss"] == 9.0


def test_runs_without_a_log_are_named(tmp_path, command):
    code, _, said = command("plot", tmp_path)
    assert code == 2 and "log.jsonl is missing" in said
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no row of training yet"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("oops\n{}\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_log(tmp_path)
    for line in ("[1]", "{}", '{"kind": "train", "step": 1}'):
        (tmp_path / "log.jsonl").write_text(line + "\n{}\n")
        with pytest.raises(ValueError, match="log.jsonl, line 1 is no row of a training run"):
            read_log(tmp_path)
