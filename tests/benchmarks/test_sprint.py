"""The prepared training run: from packed inputs to weights that export and sample, on time."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from running import rows
from safetensors import safe_open
from safetensors.torch import load_file

from unclip import UnCLIPPipeline
from unclip.training.export import export_pipeline

sys.path.insert(0, str(ROOT / "benchmarks"))

import sprint
import sprint_pack
import sprint_train
from sprint_pack import SETTINGS, pack
from sprint_shards import SHARD_BYTES, SHARDS, merge, read_shards, write_shards

STEPS = 40
NETWORK = {"decoder": "decoder", "prior": "prior", "draft": "text_proj"}


@pytest.fixture(autouse=True)
def noise_again(monkeypatch):
    """A run in this process leaves the objectives' noise as it was."""
    for name in ("conditioned", "decoder", "prior"):
        module = import_module(f"unclip.training.objectives.{name}")
        monkeypatch.setattr(module, "seeded_noise", module.seeded_noise)


@pytest.fixture
def inputs(tmp_path):
    """call(stage) -> the folder of its packed inputs."""

    def call(stage: str) -> Path:
        for part in "123":
            pack(sprint.arguments(["--tiny", "--stage", stage, "--pack", str(tmp_path / "inputs"), "--part", part]))
        return tmp_path / "inputs"

    return call


def options(stage: str, inputs: Path, out: Path, minutes: float = 30):
    words = ["--tiny", "--stage", stage, "--minutes", minutes, "--inputs", inputs, "--out", out]
    return sprint.arguments(list(map(str, words)))


@pytest.mark.parametrize("stage", ["decoder", "prior", "draft"])
def test_a_stage_learns_and_its_result_exports_and_samples(stage, inputs, tiny_folder, tmp_path, monkeypatch):
    packed, out = inputs(stage), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(sprint_train, "REPORT", 0.0)
    now = time.monotonic()
    trained = sprint_train.Sprint(options(stage, packed, out), now, now + 1800)
    trained.set_up()
    taken = trained._take_step
    monkeypatch.setattr(trained, "_take_step", lambda now: (taken(now), trained.step == STEPS and trained.stop()))
    trained.train()
    train = rows(out, "train")
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in train]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert all(row["step_s"] > row["data_wait_s"] > 0 and 0 < row["mfu"] < 1.5 for row in train)
    files = list(out.iterdir())
    assert len(files) <= SHARDS + 1 and all(file.stat().st_size <= SHARD_BYTES for file in files)

    merge(out, tmp_path / "merged")
    exported = export_pipeline([tiny_folder, packed / "toy", tmp_path / "merged"], tmp_path / "exported", dtype=torch.float32)
    name = NETWORK[stage]
    kept, begun = (load_file(next((folder / name).glob("*.safetensors"))) for folder in (exported, packed / "toy"))
    weights, _ = read_shards(out)
    assert kept and all(torch.equal(kept[k], weights[f"{name}.{k}"].float()) for k in kept)
    assert any(not torch.allclose(kept[k], begun[k].float(), atol=1e-3) for k in kept)
    image = UnCLIPPipeline.from_pretrained(exported, dtype=torch.float32)("a red star").images[0]
    assert image.size == (1024, 1024)


def test_the_rate_falls_to_zero_at_the_end_of_the_time(tmp_path):
    now = time.monotonic()
    run = sprint_train.Sprint(options("prior", tmp_path, tmp_path), now, now + 102)
    run.config, run.rate, run.training_since, run.save_seconds, run.step = (
        {"cooldown": 0.5, "warmup_steps": 10},
        2.0,
        now,
        0.0,
        4,
    )
    assert run.rate_at(now) == 1.0  # the fifth of ten steps of warm-up
    run.step = 100
    assert run.rate_at(now + 49) == 2.0
    assert run.rate_at(now + 75) == pytest.approx(1.0)
    assert run.rate_at(now + 100) == pytest.approx(0.0, abs=1e-6) and run.rate_at(now + 101) == 0.0


def test_a_failure_in_training_leaves_the_last_weights(inputs, tmp_path, monkeypatch):
    packed, out = inputs("prior"), tmp_path / "out"
    watched = []
    monkeypatch.setattr(sprint, "watch", lambda deadline, out: watched.append(deadline))
    monkeypatch.setattr(sprint, "STARTED", time.monotonic())
    monkeypatch.setattr(sprint.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    taken = sprint_train.Sprint._take_step

    def step(self, now: float) -> None:
        if self.step == 3:
            raise RuntimeError("the device is gone")
        taken(self, now)

    monkeypatch.setattr(sprint_train.Sprint, "_take_step", step)
    assert sprint.run(options("prior", packed, out)) == sprint.FAILED
    assert len(watched) == 1
    files = sorted(out.glob("shard-*.safetensors"))
    with safe_open(files[0], "pt") as file:
        assert file.metadata()["step"] == "3"


@pytest.mark.slow
def test_the_command_ends_on_time(run, inputs, tmp_path):
    packed, out, minutes = inputs("decoder"), tmp_path / "out", 1.5
    words = ("--tiny", "--stage", "decoder", "--minutes", minutes, "--inputs", packed, "--out", out)
    start = time.monotonic()
    ran = run("benchmarks/sprint.py", *words)
    assert time.monotonic() - start < 60 * minutes + 5  # of which 5 to start Python
    assert ran.returncode == sprint.ON_TIME, ran.stdout + ran.stderr
    train = rows(out, "train")
    assert len(train) > 1 and train[-1]["loss"] < train[0]["loss"]
    assert rows(out, "end")[0]["step"] == train[-1]["step"]


def test_the_watchdog_ends_a_run_that_hangs_in_its_set_up(run, tmp_path):
    (tmp_path / "sprint_train.py").write_text("import time\ntime.sleep(1000)\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, 'benchmarks']; import sprint; sprint.main()"
    begun = time.monotonic()
    ran = run("-c", code, "--minutes", "0.05", "--out", tmp_path / "out")
    assert ran.returncode == sprint.LATE and "ended by the watchdog" in ran.stdout
    assert time.monotonic() - begun < 60


def test_parts_are_within_their_size_or_refused(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    for n in range(5):
        (whole / f"file{n}").write_bytes(bytes(40))
    (whole / SETTINGS).write_text(json.dumps({"files": [f"file{n}" for n in range(5)]}))
    monkeypatch.setattr(sprint_pack, "PART_BYTES", 150)
    parts = sprint_pack._shared_out(whole)
    assert parts[0][0] == SETTINGS and sorted(name for part in parts for name in part) == sorted(
        p.name for p in whole.iterdir()
    )
    assert all(sum((whole / name).stat().st_size for name in part) <= 150 for part in parts)
    monkeypatch.setattr(sprint_pack, "PART_BYTES", 90)
    with pytest.raises(ValueError, match="do not fit into 3 parts"):
        sprint_pack._shared_out(whole)


def test_shards_hold_what_was_written_and_are_of_one_save(tmp_path):
    weights = {f"layer{n}": torch.randn(3000, 1000) for n in range(10)} | {"count": torch.tensor(3)}
    assert write_shards(tmp_path, weights, {"stage": "prior"}, 5) > 1
    assert all(file.stat().st_size <= SHARD_BYTES for file in tmp_path.iterdir())
    found, settings = read_shards(tmp_path)
    assert settings == {"stage": "prior"} and found.keys() == weights.keys()
    assert all(torch.equal(found[n], t.half() if t.is_floating_point() else t) for n, t in weights.items())
    before = (tmp_path / "shard-0.safetensors").read_bytes()
    write_shards(tmp_path, weights, {"stage": "prior"}, 6)
    (tmp_path / "shard-0.safetensors").write_bytes(before)
    with pytest.raises(ValueError, match="does not hold all files of one save"):
        read_shards(tmp_path)


def test_what_does_not_fit_is_refused_and_replaces_nothing(tmp_path):
    write_shards(tmp_path, {"weight": torch.ones(2)}, {}, 1)
    with pytest.raises(ValueError, match="do not fit into 7 files of 15 MiB"):
        write_shards(tmp_path, {"weight": torch.ones(9 * 2**20)}, {}, 2)
    assert read_shards(tmp_path)[0]["weight"].tolist() == [1, 1]
