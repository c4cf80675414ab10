"""What a run records of itself, what a resumed run may change, and how a finished one is trained further."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from PIL import Image
from running import finals, run_here, state

from unclip.io.checkpoints import checkpoints, load_checkpoint
from unclip.runtime.config import ConfigError
from unclip.training.config import read_config
from unclip.training.record import check_resumed, data_fingerprint

STAGE = "upsampler_256"


def test_the_record_trains_the_same_again(tmp_path):
    settings = ("max_steps=2", "batch_size=2", "seed=3", "objective.blur=0.4")
    first = run_here(STAGE, tmp_path / "first", *settings)
    config, sections = read_config(first / "config.yaml", [f"output_dir={tmp_path / 'x'}"])
    assert config.seed == 3 and config.batch_size == 2 and sections["objective"]["blur"] == 0.4
    assert sections["objective"]["edges"] == 1.0, "a default is stated"
    text = (first / "config.yaml").read_text()
    assert f"#   torch: {torch.__version__}" in text and "# data_fingerprint: shapes" in text
    shutil.copy(first / "config.yaml", tmp_path / "again.yaml")
    from unclip.training.trainer import train

    train(tmp_path / "again.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert finals(tmp_path / "again") == finals(first)
    kept = load_checkpoint(checkpoints(first)[0])[1]["record"]
    assert kept["configuration"]["objective"] == sections["objective"] and set(kept["versions"]) > {"python", "unclip", "torch"}


@pytest.mark.parametrize("change", ["seed=9", "objective.blur=0.1", "data.crop=0.5"])
def test_another_run_is_not_resumed_unless_told_to(tmp_path, capsys, change):
    run_here(STAGE, tmp_path, "max_steps=1", "batch_size=1")
    with pytest.raises(ConfigError) as caught:
        run_here(STAGE, tmp_path, "max_steps=2", "batch_size=1", change)
    key, _, value = change.partition("=")
    said = str(caught.value)
    assert said.startswith(f"the checkpoint of step 1 in {tmp_path} was trained with other settings ({key}: ")
    assert f" -> {value})" in said and said.endswith("choose another output_dir, or resume_changed=true")
    capsys.readouterr()
    run_here(STAGE, tmp_path, "max_steps=2", "batch_size=1", change, "resume_changed=true")
    assert f"resumed with other settings: {key}: " in capsys.readouterr().err
    assert checkpoints(tmp_path)[0].name == "checkpoint-00000002"


def test_other_settings_are_listed_and_go_on(tmp_path, capsys):
    run_here(STAGE, tmp_path, "max_steps=1", "batch_size=1")
    capsys.readouterr()
    run_here(STAGE, tmp_path, "max_steps=2", "batch_size=1", "learning_rate=5e-4", "weight_decay=0.1", "log_every=2")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "other settings" in line]
    assert line == "resumed with other settings: learning_rate: 0.001 -> 0.0005; weight_decay: 0.0 -> 0.1"


def test_a_key_that_only_one_version_has_is_no_difference():
    before = {"configuration": {"seed": 0, "objective": {"blur": 0.6, "gone": 1}, "data": {"path": "shapes"}}}
    now = {
        "configuration": {"seed": 0, "new": 1, "objective": {"blur": 0.6, "later": 2}, "data": {"path": "shapes", "crop": 1}}
    }
    with pytest.raises(ConfigError, match=r"\(data\.crop: None -> 1\)"):
        check_resumed(before, now, "it", allowed=False)
    del now["configuration"]["data"]["crop"]
    assert check_resumed(before, now, "it", allowed=False) == []


def test_a_dataset_is_known_by_its_files_wherever_it_lies(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    assert data_fingerprint(str(tmp_path / "one")) == data_fingerprint(str(tmp_path / "other"))
    (tmp_path / "other" / "3.txt").write_text("another")
    assert data_fingerprint(str(tmp_path / "one")) != data_fingerprint(str(tmp_path / "other"))
    assert data_fingerprint("user/dataset") == "user/dataset"


def test_a_finished_run_goes_on_to_more_steps_and_is_then_as_if_it_never_stopped(tmp_path, capsys):
    settings = ("batch_size=1", "cooldown=0", "warmup_steps=0")
    unbroken = run_here(STAGE, tmp_path / "unbroken", *settings, "max_steps=4")
    run = run_here(STAGE, tmp_path / "run", *settings, "max_steps=2")
    before = finals(run)
    run_here(STAGE, run, *settings, "max_steps=60", "save_every=3", stop_at=3)
    assert finals(run) == before and not checkpoints(run)[0].name.endswith("60"), "final/ is replaced when the run is done"
    for name in checkpoints(run):
        if int(name.name[-8:]) > 3:
            shutil.rmtree(name)
    shutil.copytree(run, tmp_path / "killed")
    run_here(STAGE, run, *settings, "max_steps=4")
    assert finals(run) == finals(unbroken) != before and not (run / "latest").exists()
    one, two = state(unbroken), state(run)
    assert all(torch.equal(one[k], two[k]) for k in one)
    rows = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]
    capsys.readouterr()
    for steps in (4, 2):
        run_here(STAGE, run, *settings, f"max_steps={steps}")
        assert "this run is finished" in capsys.readouterr().err
    run_here(STAGE, tmp_path / "killed", *settings, "max_steps=3")
    assert finals(tmp_path / "killed") != before, "a run that was killed on its way further is no finished one"


def test_another_stage_is_not_finished_by_this_one(tmp_path):
    run_here(STAGE, tmp_path, "max_steps=1", "batch_size=1")
    with pytest.raises(ConfigError, match=f"output_dir {tmp_path} holds a finished run of the stage upsampler_256, not clip"):
        run_here("clip", tmp_path, "max_steps=1")
    assert (ROOT / "configs/tiny/clip.yaml").is_file()
