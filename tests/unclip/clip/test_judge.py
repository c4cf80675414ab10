"""The judge: its training pairs are correct, its towers distinguish what they have to, and it learns."""

import pytest
import torch
from conftest import ROOT
from torch.utils.data import default_collate

from unclip.clip.judge import SHIPPED, Judge, JudgeImageTower
from unclip.data.distort import DISTORTIONS, distort
from unclip.data.judged import compare
from unclip.io.checkpoints import save_components
from unclip.runtime.config import load_config
from unclip.training.objectives import create


@pytest.fixture(scope="module")
def objective():
    config = load_config(ROOT / "configs/tiny/judge.yaml")
    torch.manual_seed(0)
    return create("judge", {k: config[k] for k in ("model", "data", "objective")}, seed=0)


@pytest.fixture(scope="module")
def batch(objective) -> dict:
    return default_collate([objective.examples[n] for n in range(48)])


def test_of_an_images_captions_only_the_first_is_true(objective, batch):
    facts = batch["facts"]  # [B, 1 + K, FACTS]
    for image, said, style in zip(facts, facts, batch["style"], strict=True):
        shown = torch.cat([image[:1, :1], style[None, None], image[:1, 2:]], 1)
        true, vague = compare(shown, said)
        assert true[0].tolist() == [True, False, False, False]
        assert not vague[0, 0]
    lines = [text.split("\n") for text in batch["captions"]]
    assert all(len(set(options)) >= 2 and options[0] not in options[1:] for options in lines)
    assert len({int(kind) for kind in facts[:, 0, 2]}) >= 5  # every kind of scene is there


def test_a_vaguer_truth_counts_neither_way(objective):
    from unclip.data.scenes import Plan

    facts = objective.examples.facts
    image = torch.tensor([facts(Plan("relation", ("star", "ring"), "noto", relation="left"), "noto")])
    texts = [
        Plan("single", ("star",), ""),
        Plan("pair", ("ring", "star"), ""),
        Plan("relation", ("star", "ring"), "", relation="left"),
        Plan("relation", ("ring", "star"), "", relation="left"),
        Plan("single", ("heart",), ""),
    ]
    true, vague = compare(image, torch.tensor([facts(p, None) for p in texts]))
    assert true[0].tolist() == [False, False, True, False, False]
    assert vague[0].tolist() == [True, True, False, False, False]


def test_every_word_of_its_captions_is_known(objective, batch):
    for text in batch["captions"]:
        for line in text.split("\n"):
            assert 1 not in objective.tokenizer(line)["input_ids"], line
    assert objective.tokenizer("a zyx")["input_ids"][1] == 1


def test_the_loss_falls(objective, batch):
    optimizer = torch.optim.AdamW(objective.trained.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss, metrics = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0] and 0 <= metrics["accuracy"] <= 1


def test_saved_and_loaded_it_judges_alike(objective, tmp_path):
    save_components(tmp_path, objective.components())
    loaded, own = Judge.load(tmp_path), objective.judge
    assert loaded.fingerprint == own.fingerprint
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    texts = ["a star to the left of a ring", "a ring to the left of a star", "two stars", "a star"]
    for mine, its in zip((own.read(texts), *own.see(images)), (loaded.read(texts), *loaded.see(images)), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)
    read = own.read(texts)
    assert (read[0] - read[1]).norm() > 1e-3  # the order of words matters
    assert torch.allclose(own.read(texts[3:]), read[3:], atol=1e-6)  # padding is not


def test_the_image_tower_knows_left_from_right():
    torch.manual_seed(0)
    tower = JudgeImageTower(channels=[16, 16], blocks=[1, 1], embedding_dim=16).eval()
    image = torch.ones(1, 3, 64, 64)
    image[..., 16:48, 4:28] = -1
    assert (tower(image).image_embeds - tower(image.flip(-1)).image_embeds).norm() > 1e-3
    with pytest.raises(ValueError, match=r"must be \[B, 3, 64, 64\], got \[1, 3, 32, 32\]"):
        tower(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_damage_changes_an_image_but_not_what_it_shows(objective, kind):
    import numpy as np

    image = objective.examples[0]["image"].permute(1, 2, 0).numpy()
    hurt = distort(image, kind, np.random.default_rng(0))
    assert hurt.shape == image.shape and hurt.dtype == np.uint8
    change = np.abs(hurt.astype(int) - image).mean()
    assert 0.1 < change < 40
    assert np.array_equal(hurt, distort(image, kind, np.random.default_rng(0)))


def test_no_judge_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no judge at .*train.py configs/emoji/judge.yaml"):
        Judge.load(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_tiny_judge_learns_to_name_shapes(run, tmp_path):
    import json

    result = run("train.py", "configs/tiny/judge.yaml", f"output_dir={tmp_path}", "validate_every=450", timeout=1800)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert found["clean_r1"] > 0.5 and found["contrasts"] > 0.5, "chance is 1/26 and 1/4"
    out = tmp_path / "judge"
    assert run("-m", "unclip", "export", tmp_path, out).returncode == 0
    assert Judge.load(out).fingerprint == Judge.load(tmp_path).fingerprint


def test_the_shipped_judges_are_two_and_small():
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 15e6
    dev, test = Judge.load("dev"), Judge.load("test")
    assert dev.fingerprint != test.fingerprint
    assert not torch.equal(dev.read(["a star"]), test.read(["a star"]))
