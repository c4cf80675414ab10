"""The speed that a run logs, and the trace of its steps."""

import json

import pytest
import torch
from conftest import ROOT
from running import run_here

from unclip.runtime.config import load_config
from unclip.training import throughput
from unclip.training.objectives import create
from unclip.training.planning import plan
from unclip.training.throughput import Throughput, flops_per_sample

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A list whose only entry is the time that time.monotonic tells."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def test_a_lap_counts_steps_and_waiting_and_no_pause(clock, monkeypatch):
    monkeypatch.setattr(throughput, "measured_peak", lambda device, dtype: 1e12)
    found = Throughput(samples_per_step=8, processes=2, device=CPU, dtype=torch.float32, flops=10**9)
    for _ in range(4):
        clock[0] += 0.5
        found.step()
        with found.paused():
            clock[0] += 7
    first = found.lap(waited=0.2)
    assert found.seconds == pytest.approx(2.0)
    assert first["images_per_s"] == pytest.approx(16) and first["step_s"] == pytest.approx(0.5)
    assert first["data_wait_s"] == pytest.approx(0.05) and first["tflops"] == pytest.approx(16 * 1e9 / 2 / 1e12)
    assert "mfu" not in first and first["peak_memory"] > 10**7
    clock[0] += 40
    found.step()
    second = found.lap(waited=1.2)
    assert second["data_wait_s"] == pytest.approx(1.0) and second["step_s"] == pytest.approx(40)
    assert second["mfu"] == pytest.approx(second["tflops"]) == pytest.approx(8 / 40 * 1e9 / 2 / 1e12)


@pytest.mark.parametrize("stage", ["upsampler_256", "judge"])
def test_the_operations_of_a_sample_are_those_of_the_plan(stage):
    """The judge's names are in a batch once, whatever its size."""
    path = ROOT / f"configs/tiny/{stage}.yaml"
    config = load_config(path)
    objective = create(stage, config, seed=0)
    before = [p.detach().clone() for p in objective.parameters()]
    state = torch.get_rng_state()
    counted = flops_per_sample(objective, config["batch_size"])
    assert counted == pytest.approx(plan(path, [], gpus=0).training_flops, rel=0.01)
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in objective.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True))


def test_a_run_logs_its_speed_and_writes_the_trace_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "PEAK_AFTER", 0.0)
    monkeypatch.setattr(throughput, "measured_peak", lambda device, dtype: 1e12)
    run_here("upsampler_256", tmp_path, "max_steps=4", "batch_size=1", "profile_steps=[2, 3]")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["step_s"] >= row["data_wait_s"] >= 0 and row["images_per_s"] == pytest.approx(1 / row["step_s"], rel=0.01)
        assert row["tflops"] > 0 and row["mfu"] == pytest.approx(row["tflops"], abs=2e-6) and row["peak_memory"] > 10**7
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-2-3.0.json"
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2, "two steps, no more"


def test_steps_to_profile_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"profile_steps must be \[first, last\] with 1 <= first <= last, got \[3, 2\]"):
        run_here("upsampler_256", tmp_path / "x", "profile_steps=[3, 2]")
    assert not (tmp_path / "x").exists()
