"""Training in parts (ZeRO) is training whole: the same weights and the same checkpoints, on real processes."""

import json
import os
import shutil

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from running import finals, finish, kill, run_here, start, state
from torch import Tensor

from unclip.runtime.config import ConfigError
from unclip.training.sharding import launched

STAGES = ("clip", "prior", "prior_autoregressive", "decoder", "upsampler_256", "upsampler_1024")
FEW = (
    "max_steps=4",
    "eps=1e-4",
)  # a larger eps: Adam divides by a gradient's size and would enlarge the rounding of small ones


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("stage", "sharding"),
    [
        pytest.param(stage, sharding, marks=() if (stage, sharding) == ("decoder", "zero3") else pytest.mark.slow)
        for stage in STAGES
        for sharding in ("zero2", "zero3")
    ],
)
def test_in_parts_is_whole(tmp_path, stage, sharding):
    settings = [*FEW, "validate_every=4", "sample_every=4"]
    if "prior" in stage or stage == "decoder":
        run_here("clip", tmp_path / "clip", "max_steps=1")
        settings.append(f"objective.clip={tmp_path / 'clip'}")
    run_here(stage, tmp_path / "whole", *settings, "batch_size=8")
    split = (
        ("batch_size=4",) if stage == "clip" else ("batch_size=2", "gradient_accumulation=2")
    )  # clip's negatives are the batch
    said = finish(start(stage, tmp_path / "parts", *settings, *split, f"sharding={sharding}", processes=2))
    assert "processes: 2," in said
    assert_close(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert finals(tmp_path / "whole").keys() == finals(tmp_path / "parts").keys()
    metrics, others = (held_out(tmp_path / name) for name in ("whole", "parts"))
    assert metrics.keys() == others.keys() and metrics
    assert all(others[k] == pytest.approx(v, rel=1e-3, abs=1e-3) for k, v in metrics.items())
    images = [sorted(p.name for p in (tmp_path / name).glob("samples/*")) for name in ("whole", "parts")]
    assert images[0] == images[1]


def held_out(folder) -> dict[str, float]:
    """What a run's last validation found."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [r for r in rows if r["kind"] == "validation"][-1]
    return {k: v for k, v in found.items() if k not in ("kind", "step", "samples", "seconds")}


@pytest.mark.slow
def test_killed_in_parts_is_unbroken(tmp_path):
    settings = ("max_steps=8", "save_every=2", "batch_size=2", "sharding=zero3")
    finish(start("upsampler_256", tmp_path / "unbroken", *settings, processes=2))
    broken = tmp_path / "broken"
    kill(start("upsampler_256", broken, *settings, processes=2), lambda: any(broken.glob("checkpoint-0000000[4-6].partial")))
    assert not (broken / "final").exists()
    assert "resuming at step" in finish(start("upsampler_256", broken, *settings, processes=2))
    one, two = state(tmp_path / "unbroken"), state(broken)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert finals(tmp_path / "unbroken") == finals(broken)


@pytest.mark.slow
def test_a_run_goes_on_in_parts_and_whole_again(tmp_path):
    settings = (*FEW, "save_every=1", "keep=9")
    whole = run_here("upsampler_256", tmp_path / "whole", *settings, "batch_size=4")
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copytree(whole / "checkpoint-00000001", moved / "checkpoint-00000001")
    finish(start("upsampler_256", moved, *settings, "batch_size=2", "sharding=zero2", processes=2))
    for last in ("final", "checkpoint-00000003", "checkpoint-00000004"):
        shutil.rmtree(moved / last)
    run_here("upsampler_256", moved, *settings, "batch_size=4")
    assert_close(state(whole), state(moved))


HELD = """
import sys
from pathlib import Path
from torch.distributed.tensor import DTensor
from unclip.training.checkpointer import Checkpointer
from unclip.training.config import read_config
from unclip.training.distributed import Distributed
from unclip.training.trainer import Trainer, create_objective
config, sections = read_config("configs/tiny/decoder.yaml", sys.argv[1:])
distributed = Distributed(config)
objective = create_objective(config, sections, distributed)
checkpointer = Checkpointer(Path(config.output_dir), config.keep, distributed)
with checkpointer.locked():
    trainer = Trainer(config, sections, objective, distributed, checkpointer)
for held in (objective.trained_parameters(), trainer.ema.shadow):
    local = [t.to_local() if isinstance(t, DTensor) else t for t in held.values()]
    print(sum(t.numel() for t in local) / sum(t.numel() for t in held.values()), file=sys.stderr)
"""


@pytest.mark.slow
def test_each_process_holds_its_part(tmp_path):
    run_here("clip", tmp_path / "clip", "max_steps=1")
    (tmp_path / "held.py").write_text(HELD)
    settings = (f"objective.clip={tmp_path / 'clip'}", f"output_dir={tmp_path / 'x'}", "sharding=zero3")
    said = finish(start(str(tmp_path / "held.py"), tmp_path / "x", *settings, processes=2))
    shares = [float(line) for line in said.splitlines() if line.startswith("0.")]
    assert len(shares) == 2 and all(0.49 < share < 0.52 for share in shares)


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_accelerates_own_configuration_asks_for_it(monkeypatch, sharding):
    path = ROOT / f"configs/accelerate/fsdp_{sharding}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments = _validate_launch_command(arguments)[0]
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    assert launched() == sharding
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        assert variable not in os.environ, "Accelerate would do it a second time"


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version must be 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use gradient_checkpointing=true instead"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: use sharding=zero2 or sharding=zero3"),
    ],
)
def test_what_a_launcher_may_not_ask_for(tmp_path, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        run_here("upsampler_256", tmp_path / "x", "max_steps=1")
    assert not (tmp_path / "x").exists()


def test_one_process_has_nothing_to_share(tmp_path):
    with pytest.raises(ConfigError, match="sharding zero3 needs several processes: start with torchrun or accelerate launch"):
        run_here("upsampler_256", tmp_path / "x", "max_steps=1", "sharding=zero3")
    with pytest.raises(ConfigError, match="sharding must be none, zero2 or zero3, got 'zero1'"):
        run_here("upsampler_256", tmp_path / "x", "max_steps=1", "sharding=zero1")
    assert not (tmp_path / "x").exists()
