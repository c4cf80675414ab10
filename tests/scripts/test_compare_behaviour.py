"""The comparison of two commits' behaviour: what it takes for a difference."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from compare_behaviour import differences

ANSWER = {"command": ["plot"], "code": 0, "stdout": "OUT/a.png\n", "stderr": "a progress bar"}
INDEX = {"_class_name": "UnCLIPPipeline", "text_encoder": ["unclip.clip", "TextTower"]}


@pytest.fixture
def folders(tmp_path):
    """Two equal folders of answers."""
    base, tree = tmp_path / "base", tmp_path / "tree"
    (base / "model").mkdir(parents=True)
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, base / "model" / "weights.safetensors")
    (base / "model" / "model_index.json").write_text(json.dumps(INDEX))
    (base / "plot.answer.json").write_text(json.dumps(ANSWER))
    (base / "clip.curve.json").write_text(json.dumps([3.0, 2.0]))
    (base / "image.png").write_bytes(b"image")
    (base / ".lock").write_text("process 1")
    shutil.copytree(base, tree)
    return base, tree


def test_equal_folders_have_no_differences(folders):
    base, tree = folders
    (tree / ".lock").write_text("process 2")
    (tree / "plot.answer.json").write_text(json.dumps(ANSWER | {"stderr": "another progress bar"}))
    (tree / "clip.curve.json").write_text(json.dumps([3.0, 2.0 * (1 + 0.9e-4)]))
    (tree / "model" / "model_index.json").write_text(json.dumps(INDEX | {"text_encoder": ["unclip.clip.towers", "TextTower"]}))
    assert list(differences(base, tree)) == []


def changed_tensor(tree):
    path = tree / "model" / "weights.safetensors"
    save_file({"a": torch.ones(3), "b": torch.tensor([0.0, 1e-7])}, path)
    return "model/weights.safetensors: b differs"


def missing_tensor(tree):
    save_file({"a": torch.ones(3)}, tree / "model" / "weights.safetensors")
    return "model/weights.safetensors: b is only in BASE"


def changed_image(tree):
    (tree / "image.png").write_bytes(b"other")
    return "image.png: differs"


def missing_image(tree):
    (tree / "image.png").unlink()
    return "image.png: only in BASE"


def another_image(tree):
    (tree / "other.png").write_bytes(b"other")
    return "other.png: only in the working tree"


def another_class(tree):
    (tree / "model" / "model_index.json").write_text(json.dumps(INDEX | {"text_encoder": ["unclip.clip", "Tower"]}))
    return "model/model_index.json: "


def another_exit_code(tree):
    (tree / "plot.answer.json").write_text(json.dumps(ANSWER | {"code": 2}))
    return "plot.answer.json: code: 0 and 2"


def another_loss(tree):
    (tree / "clip.curve.json").write_text(json.dumps([3.0, 2.0 * (1 + 1.1e-4)]))
    return "clip.curve.json: the loss of step 2 is 2.0 and 2.00022"


def lost_loss(tree):
    (tree / "clip.curve.json").write_text(json.dumps([3.0, float("nan")]))
    return "clip.curve.json: the loss of step 2 is 2.0 and nan"


def shorter_curve(tree):
    (tree / "clip.curve.json").write_text(json.dumps([3.0]))
    return "clip.curve.json: 2 and 1 losses"


@pytest.mark.parametrize(
    "change",
    [
        changed_tensor,
        missing_tensor,
        changed_image,
        missing_image,
        another_image,
        another_class,
        another_exit_code,
        another_loss,
        lost_loss,
        shorter_curve,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_is_one_line(folders, change):
    base, tree = folders
    line = change(tree)
    found = list(differences(base, tree))
    assert len(found) == 1 and found[0].startswith(line)
