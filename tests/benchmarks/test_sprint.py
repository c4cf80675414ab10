"""The prepared training run: from packed inputs to weights that export and sample, on time."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from unclip import UnCLIPPipeline
from unclip.training.export import export_pipeline

sys.path.insert(0, str(ROOT / "benchmarks"))

from sprint import arguments
from sprint_pack import pack
from sprint_shards import SHARD_BYTES, SHARDS, merge, read_shards, write_shards

MINUTES = 1.5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder", "prior", "draft"])
def test_a_run_learns_ends_on_time_and_its_result_exports_and_samples(stage, run, tiny_folder, tmp_path):
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    for part in "123":
        pack(arguments(["--tiny", "--stage", stage, "--pack", str(inputs), "--part", part]))
    start = time.monotonic()
    ran = run("benchmarks/sprint.py", "--tiny", "--stage", stage, "--minutes", MINUTES, "--inputs", inputs, "--out", out)
    assert time.monotonic() - start < 60 * MINUTES + 5  # of which 5 to start Python
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"]
    assert all(row["step_s"] > 0 and row["data_wait_s"] > 0 and 0 < row["mfu"] < 1.5 for row in train)
    assert rows[-1]["kind"] == "end" and rows[-1]["step"] == train[-1]["step"] > 5
    files = list(out.iterdir())
    assert len(files) <= SHARDS + 1 and all(file.stat().st_size <= SHARD_BYTES for file in files)

    merge(out, tmp_path / "merged")
    exported = export_pipeline([tiny_folder, inputs / "toy", tmp_path / "merged"], tmp_path / "exported", dtype=torch.float32)
    trained, _ = read_shards(out)
    name = {"decoder": "decoder", "prior": "prior", "draft": "text_proj"}[stage]
    kept = load_file(next((exported / name).glob("*.safetensors")))
    assert kept and all(torch.equal(kept[k], trained[f"{name}.{k}"].float()) for k in kept)
    begun = load_file(next((inputs / "toy" / name).glob("*.safetensors")))
    assert any(not torch.allclose(kept[k], begun[k].float(), atol=1e-3) for k in kept)
    image = UnCLIPPipeline.from_pretrained(exported, dtype=torch.float32)("a red star").images[0]
    assert image.size == (256, 256)


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
    assert Path(tmp_path / "shard-0.safetensors").is_file()
