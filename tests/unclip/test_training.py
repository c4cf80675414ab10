"""Every tiny stage trains through the real entry point; a resumed run is the unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from unclip.config import ConfigError, construct, load_config
from unclip.training import GlobalBatches, PowerEMA, Run, train

STAGES = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All five stages for two steps, each in a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        needs_clip = [f"objective.clip={folder / 'clip' / 'final'}"] if stage in ("prior", "decoder") else []
        command = [sys.executable, "train.py", f"configs/tiny/{stage}.yaml", f"output_dir={folder / stage}", "max_steps=2"]
        more = ["sample_every=2", "validate_every=2", "batch_size=4", "log_every=1"]
        result = subprocess.run([*command, *more, *needs_clip], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr.splitlines()[0] == "processes: 1, device: cpu, dtype: no"
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_leaves_weights_metrics_and_a_picture(runs, stage):
    assert list((runs / stage / "final").rglob("*.safetensors"))
    rows = [json.loads(line) for line in (runs / stage / "log.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in rows} == {"train", "validation"}
    assert all(torch.tensor([v for v in r.values() if isinstance(v, float)]).isfinite().all() for r in rows)
    pictures = list((runs / stage).glob("samples/*.png"))
    assert len(pictures) == (0 if stage in ("clip", "prior") else 1)


def test_the_stages_together_draw(runs, run, tmp_path):
    assert run("-m", "unclip", "export", *(runs / s for s in STAGES), tmp_path / "pipe").returncode == 0
    result = run("-m", "unclip", "generate", "a star", "--model", tmp_path / "pipe", "--out", tmp_path / "star.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "star.png").is_file()


def test_a_finished_run_says_so_and_changes_nothing(runs, run):
    files = {p: p.stat().st_mtime_ns for p in (runs / "prior").rglob("*") if p.is_file()}
    result = run(
        "train.py", "configs/tiny/prior.yaml", f"output_dir={runs / 'prior'}", f"objective.clip={runs / 'clip' / 'final'}"
    )
    assert result.returncode == 0 and "finished" in result.stderr
    assert files == {p: p.stat().st_mtime_ns for p in (runs / "prior").rglob("*") if p.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    names = ("weights", "ema", "optimizer")
    return {f"{n}.{k}": v for n in names for k, v in load_file(newest / f"{n}.safetensors").items()}


def test_resumed_is_unbroken(tmp_path):
    """Stopped by SIGTERM at some step and started again with the same command: bitwise the same weights, EMA and moments."""
    common = ["max_steps=40", "sample_every=0", "save_minutes=0", "log_every=1000"]

    def command(name: str) -> list[str]:
        config = ["configs/tiny/upsampler_256.yaml", f"output_dir={tmp_path / name}", *common]
        return [sys.executable, "train.py", *config]

    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    assert subprocess.run(command("unbroken"), cwd=ROOT, capture_output=True, check=False, env=environment).returncode == 0
    process = subprocess.Popen(
        command("broken") + ["save_every=3"], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "broken").glob("checkpoint-*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0
    assert "stopped at step" in said and not (tmp_path / "broken" / "final").exists()
    again = subprocess.run(command("broken"), cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0 and "resuming at step" in again.stderr
    unbroken, broken = weights(tmp_path / "unbroken"), weights(tmp_path / "broken")
    assert unbroken.keys() == broken.keys()
    assert all(torch.equal(unbroken[k], broken[k]) for k in unbroken)


def test_a_damaged_newest_checkpoint_is_reported_and_skipped(tmp_path, run):
    command = ["train.py", "configs/tiny/upsampler_256.yaml", f"output_dir={tmp_path}", "save_every=2", "sample_every=0"]
    assert run(*command, "max_steps=4").returncode == 0
    newest = sorted(tmp_path.glob("checkpoint-*"))[-1] / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    (tmp_path / "final").rename(tmp_path / "old")
    result = run(*command, "max_steps=6")
    assert result.returncode == 0
    assert "damaged" in result.stderr and str(newest) in result.stderr and "resuming at step 2" in result.stderr


def test_training_lowers_the_loss(runs, tmp_path):
    settings = ["max_steps=60", "sample_every=0", "log_every=20", "cooldown=0", f"objective.clip={runs / 'clip'}"]
    train(ROOT / "configs/tiny/decoder.yaml", [f"output_dir={tmp_path}", *settings])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[0] > 0.7 and losses[-1] < 0.6 * losses[0]


def test_a_diverged_run_stops_with_its_step_and_last_checkpoint(run, tmp_path):
    result = run(
        "train.py",
        "configs/tiny/upsampler_256.yaml",
        *(f"output_dir={tmp_path}", "learning_rate=1e30", "clip_norm=1e30", "warmup_steps=0", "save_every=1", "sample_every=0"),
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "is not finite; last checkpoint: " in last and "step " in last


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.chanels=[8]", "unknown key model.chanels (did you mean 'channels'?)"),
        ("learning_rat=1", "unknown key config.learning_rat (did you mean 'learning_rate'?)"),
        ("stage=decodr", "unknown stage 'decodr' (did you mean 'decoder'?)"),
        ("objective.blurr=1", "unknown key objective.blurr (did you mean 'blur'?)"),
        ("precision=int8", "got 'int8'"),
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("data.path=nowhere", "unclip data emoji"),
        ("model.channels=[8]", "must be equally long"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, override, message):
    with pytest.raises((ConfigError, FileNotFoundError)) as caught:
        train(ROOT / "configs/tiny/upsampler_256.yaml", [f"output_dir={tmp_path / 'x'}", override])
    assert message in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_numbers_with_exponents_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1e-4\nb: 2\nc: x1e4\n")
    assert load_config(tmp_path / "c.yaml", ["d=3e2", "e.f=true"]) == {
        "a": 1e-4,
        "b": 2,
        "c": "x1e4",
        "d": 300.0,
        "e": {"f": True},
    }


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_configuration_fills_its_constructor(config):
    content = load_config(config)
    for section in ("model", "data", "objective"):
        content.pop(section, None)
    assert config.stem.startswith(construct(Run, content, "config").stage)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_sees_the_same_examples(processes):
    run = Run("x", "x", max_steps=3, batch_size=8 // processes, learning_rate=1.0, gradient_accumulation=2)
    shares = [list(GlobalBatches(run, 0, rank, processes)) for rank in range(processes)]
    for step in range(3):
        seen = [i for share in shares for batch in share[2 * step : 2 * step + 2] for i in batch]
        assert sorted(seen) == list(range(16 * step, 16 * step + 16))
    assert list(GlobalBatches(run, 2, 0, processes)) == shares[0][4:]


def test_the_learning_rate_warms_up_and_cools_down():
    run = Run("x", "x", max_steps=100, batch_size=1, learning_rate=1.0, warmup_steps=10, cooldown=0.2)
    rates = [run.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:80] == [1.0] * 71
    assert rates[-1] == pytest.approx(0.05) and all(a >= b for a, b in zip(rates[80:], rates[81:], strict=False))


def test_the_average_has_the_width_it_claims():
    """Averaging the step number itself gives the profile's mean, and its square the standard deviation."""
    steps = 4000
    first, second = (PowerEMA({"x": torch.zeros(1)}, 0.1) for _ in range(2))
    for t in range(1, steps + 1):
        first.update({"x": torch.tensor([t / steps])}, t)
        second.update({"x": torch.tensor([(t / steps) ** 2])}, t)
    mean, square = float(first.shadow["x"]), float(second.shadow["x"])
    assert (square - mean**2) ** 0.5 == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("stage", ["upsampler_256", "clip"])
def test_two_processes_are_one_of_twice_the_batch(tmp_path, stage):
    common = [f"configs/tiny/{stage}.yaml", "max_steps=4", "sample_every=0", "save_minutes=0"]
    common.append("eps=1e-4")  # Adam divides by a gradient's size: with 1e-8 it would enlarge the rounding of those near zero
    alone = [sys.executable, "train.py", *common, f"output_dir={tmp_path / 'one'}", "batch_size=8"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    together = [*launch, "train.py", *common, f"output_dir={tmp_path / 'two'}", "batch_size=4"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    said = []
    for command in (alone, together):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        said.append(result.stderr)
    assert "processes: 1," in said[0] and "processes: 2," in said[1]
    one, two = (load_file(sorted((tmp_path / n).glob("checkpoint-*"))[-1] / "weights.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
