"""The style judge: what it counts is there, it learns the styles, and the shipped one is whole."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from unclip.data.icon_packages import STYLES
from unclip.data.icons import IconSet
from unclip.evaluation.poses import in_pose, jittered
from unclip.evaluation.style_judge import BINS, FILE, GRADIENT_BINS, StyleJudge, augmented, features, train


@pytest.fixture(scope="module")
def icons() -> IconSet:
    return IconSet.load("shapes")


def styles(icons: IconSet, rows: list[int]) -> torch.Tensor:
    return torch.tensor([STYLES.index(icons.icons[row]["style"]) for row in rows])


def test_what_it_counts_are_shares_of_the_object(icons):
    images = in_pose(icons, [0, 30, 61]).float() / 255
    found = features(images)
    sizes = [bins**3 for bins in BINS] + [len(GRADIENT_BINS) + 1]
    for part in found.split(sizes, 1)[:-1]:
        assert torch.allclose(part.square().sum(1), torch.ones(3), atol=1e-4)
    assert torch.allclose(found[:, -sizes[-1] :].sum(1), torch.ones(3), atol=1e-5)
    wider = torch.nn.functional.pad(images, (16, 16, 16, 16), value=1.0)
    assert torch.allclose(features(wider), found, atol=1e-5), "the white around it says nothing"
    assert not torch.allclose(features(images.flip(1)), found, atol=0.1)
    assert features(torch.ones(1, 3, 64, 64)).sum() == 0


def test_it_learns_the_styles_and_reads_what_it_has_not_seen(icons, tmp_path):
    rows = list(range(len(icons)))
    seen, held_out = [r for r in rows if r // 4 % 3], [r for r in rows if not r // 4 % 3]
    judge = train(in_pose(icons, seen), styles(icons, seen), views=1, updates=60)
    images = jittered(icons, held_out, seed=0)
    assert (judge.read(images) == styles(icons, held_out)).float().mean() > 0.95
    hurt = (augmented(images.float() / 255, torch.Generator().manual_seed(0)) * 255).round().byte()
    assert (judge.read(hurt) == styles(icons, held_out)).float().mean() > 0.9
    judge.save(tmp_path / "style.safetensors")
    again = StyleJudge.load(tmp_path / "style.safetensors")
    assert torch.equal(again.read(images), judge.read(images))
    assert torch.equal(again.read(images[3:4]), judge.read(images)[3:4]), "alone as among others"
    other = train(in_pose(icons, seen), styles(icons, seen), views=1, updates=60)
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), other.state_dict().values(), strict=True))


def test_damage_is_little_and_leaves_the_ground_its_colour(icons):
    images = in_pose(icons, [0, 30, 61, 90]).float() / 255
    hurt = augmented(images, torch.Generator().manual_seed(2))
    assert hurt.shape == images.shape and hurt.min() >= 0 and hurt.max() <= 1
    assert 1e-4 < (hurt - images).abs().mean() < 0.08
    assert (hurt[:, :, 0, 0] > 0.85).all()


def test_the_shipped_one_is_whole_and_small():
    assert FILE.stat().st_size < 1e6
    judge = StyleJudge.load()
    assert all(torch.isfinite(tensor).all() for tensor in judge.state_dict().values())
    assert judge.read(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).shape == (2,)


def test_the_command_that_trains_it(tmp_path):
    out = tmp_path / "style.safetensors"
    words = [sys.executable, ROOT / "benchmarks" / "style_judge.py", "--data", "shapes", "--out", out]
    said = subprocess.run([*words, "--views", "0", "--updates", "40"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert StyleJudge.load(out).mean.abs().sum() > 0
    assert "| held-out concepts, clean (" in said.stdout and said.stdout.count("%") == 6
