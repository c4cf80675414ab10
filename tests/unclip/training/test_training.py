"""Every tiny stage trains through the real entry point, on one process and on two."""

import json
import re
import shutil
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import ComputeEnvironment
from conftest import ROOT, TWO_PROCESSES
from running import QUIET, finish, run_here, start, state
from safetensors.torch import load_file

from unclip.runtime.config import ConfigError, load_config
from unclip.runtime.operations import Operations
from unclip.training.batches import GlobalBatches, TrainingBatches
from unclip.training.checkpointer import Checkpointer
from unclip.training.config import OPTIMIZERS, TrainConfig, read_config
from unclip.training.distributed import Distributed
from unclip.training.ema import PowerEMA
from unclip.training.evaluator import Evaluator
from unclip.training.trainer import Trainer, create_objective, train

CONFIGS = [p for p in sorted((ROOT / "configs").glob("*/*.yaml")) if p.parent.name != "accelerate"]
STAGES = ("clip", "prior", "prior_autoregressive", "text_proj", "decoder", "decoder_distill", "upsampler_256", "upsampler_1024")


def parts(stage: str, runs: Path) -> list[str]:
    """What a stage is trained on top of, of the runs so far."""
    settings = [f"objective.clip={runs / 'clip'}"] if stage.startswith(("prior", "text_proj", "decoder")) else []
    return settings + ([f"init_from={runs / 'decoder'}"] if stage == "decoder_distill" else [])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every stage for two steps; the first through the script, in a process of its own, the others here."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        settings = [f"output_dir={folder / stage}", "max_steps=2"]
        settings += ["sample_every=2", "validate_every=2", "batch_size=4", "log_every=1"]
        settings += parts(stage, folder)
        if stage == STAGES[0]:
            said = finish(start(stage, folder / stage, *settings))
            assert said.splitlines()[0] == "processes: 1, device: cpu, dtype: no"
        else:
            train(ROOT / f"configs/tiny/{stage}.yaml", settings)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_leaves_weights_metrics_and_a_image(runs, stage):
    assert list((runs / stage / "final").rglob("*.safetensors"))
    rows = [json.loads(line) for line in (runs / stage / "log.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in rows} == {"train", "validation"}
    assert all(torch.tensor([v for v in r.values() if isinstance(v, float)]).isfinite().all() for r in rows)
    images = list((runs / stage).glob("samples/*.png"))
    assert len(images) == (1 if stage.startswith(("decoder", "upsampler")) else 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "decoder_distill"])
def test_a_whole_step_makes_no_host_wait(runs, stage, optimizer, tmp_path):
    """Both passes, gradient norm, optimiser and average, done as on another device than the CPU; a planted read is seen.

    The teacher's scheduler looks its timesteps up in tables that stay on the CPU, on any device.
    """
    settings = [*parts(stage, runs), f"output_dir={tmp_path}", "batch_size=2", f"optimizer={optimizer}", "validate_every=0"]
    config, sections = read_config(ROOT / f"configs/tiny/{stage}.yaml", settings)
    distributed = Distributed(config)
    objective = create_objective(config, sections, distributed)
    made = Trainer(config, sections, objective, distributed, Checkpointer(tmp_path, config.keep, distributed))
    made.monitor.checks_every_step, objective.compiled = False, True
    if stage == "text_proj":  # elsewhere all icons are looked at before the first step
        objective.icon_embeds(torch.arange(len(objective.examples.icons)))
    with TrainingBatches(objective.examples, GlobalBatches(config, 0, 0, 1)) as loaded:
        batches = iter(list(islice(loaded, 3)))  # what examples are made of is the workers' business
    made.train_step(batches)
    with Operations("cpu") as found:
        made.train_step(batches)
    assert not found.host_reads, found.host_reads
    plain = objective.compute_loss

    def planted(batch):
        loss, metrics = plain(batch)
        return loss * (1 if loss > 0 else 2), metrics

    objective.compute_loss = planted
    with Operations("cpu") as found:
        made.train_step(batches)
    assert len(found.host_reads) == 1 and "test_training.py" in found.host_reads[0]


def test_the_stages_together_draw(runs, command, tmp_path):
    assert command("export", *(runs / s for s in STAGES), tmp_path / "pipe")[0] == 0
    said = "".join(p.read_text() for p in (tmp_path / "pipe").rglob("*.json"))
    assert str(runs) not in said and "_name_or_path" not in said, "a checkpoint tells nothing of the machine it is from"
    code, _, error = command("generate", "a star", "--model", tmp_path / "pipe", "--out", tmp_path / "star.png")
    assert code == 0, error
    assert (tmp_path / "star.png").is_file()


def test_a_finished_run_says_so_and_changes_nothing(runs, command):
    """Nor does it need anything any more: the CLIP and the data that it learned from may be gone."""
    files = {p: p.stat().st_mtime_ns for p in (runs / "prior").rglob("*") if p.is_file()}
    gone = ("objective.clip=gone", "data.path=gone", "data.embeddings=gone")
    code, _, error = command("train", "tiny/prior", "max_steps=2", f"output_dir={runs / 'prior'}", *gone)
    assert code == 0 and "this run is finished" in error, error
    assert files == {p: p.stat().st_mtime_ns for p in (runs / "prior").rglob("*") if p.is_file()}


def test_time_is_of_training_alone_and_all_of_it(tmp_path, monkeypatch):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda *arguments: time.sleep(0.1) or step(*arguments))
    monkeypatch.setattr(Evaluator, "write", lambda *arguments: time.sleep(0.4))
    began = time.monotonic()
    run_here("upsampler_256", tmp_path, "max_steps=8", "log_every=4", "save_every=1", "batch_size=1")
    took = time.monotonic() - began
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 4, 8]
    assert rows[2]["seconds"] - rows[1]["seconds"] >= 0.35 and rows[2]["images_per_s"] < 1 / 0.1
    assert 0.8 <= rows[2]["seconds"] < took - 7 * 0.4


def test_stopped_by_a_signal_and_resumed_is_unbroken(tmp_path):
    settings = ("max_steps=8", "save_every=2")
    unbroken = run_here("upsampler_256", tmp_path / "unbroken", *settings)
    broken = tmp_path / "broken"
    (process,) = start("upsampler_256", broken, *settings, "max_steps=100000")
    while not list(broken.glob("checkpoint-*/manifest.json")):
        assert process.returncode is None
        time.sleep(0.01)
    process.terminate()
    said = finish([process])
    assert "stopped at step" in said and not (broken / "final").exists()
    broken = run_here("upsampler_256", tmp_path / "here", *settings, stop_at=4)
    assert not (broken / "final").exists()
    run_here("upsampler_256", broken, *settings)
    one, two = state(unbroken), state(broken)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_training_lowers_the_loss(runs, tmp_path):
    settings = ["max_steps=60", "sample_every=0", "validate_every=60", "log_every=20", "cooldown=0"]
    settings += ["objective.drop_text=0.1", f"objective.clip={runs / 'clip'}"]
    train(ROOT / "configs/tiny/decoder.yaml", [f"output_dir={tmp_path}", *settings])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[0] > 0.7 and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.chanels=[8]", "unknown key model.chanels (did you mean 'channels'?)"),
        ("learning_rat=1", "unknown key config.learning_rat (did you mean 'learning_rate'?)"),
        ("stage=decodr", "unknown stage 'decodr' (did you mean 'decoder'?)"),
        ("objective.blurr=1", "unknown key objective.blurr (did you mean 'blur'?)"),
        ("precision=int8", "got 'int8'"),
        ("max_steps=abc", "config.max_steps must be a whole number, got 'abc'"),
        ("save_every=2.5", "config.save_every must be a whole number, got 2.5"),
        ("learning_rate=fast", "config.learning_rate must be a number, got 'fast'"),
        ("learning_rate=-1", "learning_rate must be at least 0, got -1"),
        ("learning_rate=.nan", "config.learning_rate must be a number, got nan"),
        ("betas=3", "config.betas must be a list of 2 (a number), got 3"),
        ("betas=[0.9]", "config.betas must be a list of 2 (a number), got [0.9]"),
        ("compile=maybe", "config.compile must be true or false, got 'maybe'"),
        ("report_to={a: 1}", "config.report_to must be a list (a text) or a text or null, got {'a': 1}"),
        ("ema=2", "ema must be from 0 to less than 0.289, got 2"),
        ("ema_decay=1", "ema_decay must be from 0 to less than 1, got 1"),
        ("workers=-1", "workers must be at least 0, got -1"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("model=3", "model must be a section of keys, got 3"),
        ("objective.blur=much", "objective.blur must be a number, got 'much'"),
        ("objective.blur=-1", "blur must be at least 0, got -1"),
        ("model.channels=8", "model.channels must be a list (a whole number), got 8"),
        ("data.crop=2", "crop must be above 0 and at most 1, got 2"),
        ("model=[", "'model=[': the value is not valid YAML: expected the node content, but found '<stream end>' (line 1"),
        (f"output_dir={__file__}", "test_training.py is a file"),
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("objective.beta_schedule=cosine", "objective.beta_schedule must be squaredcos_cap_v2 or linear, got 'cosine'"),
        ("objective.sampling_steps=0", "objective.sampling_steps must be from 1 to 1000, got 0"),
        ("data.path=nowhere", "unclip data emoji"),
        ("model.channels=[8]", "must be equally long"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, override, message):
    with pytest.raises((ConfigError, FileNotFoundError)) as caught:
        train(ROOT / "configs/tiny/upsampler_256.yaml", [f"output_dir={tmp_path / 'x'}", override])
    assert message in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_clip_that_is_not_trained_yet_says_what_makes_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, said = command("train", "tiny/prior")
    assert (
        code == 2 and said.splitlines()[-1] == "error: objective: clip runs/tiny/clip is not there yet: unclip train tiny/clip"
    )
    with pytest.raises(ConfigError, match="unknown model 'nowhere'"):
        train("tiny/prior", ["objective.clip=nowhere"])


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("clip", "objective.temperature=0", "objective: temperature must be above 0, got 0"),
        ("clip", "objective.text_rate=-1", "text_rate and anchor must be at least 0, got -1"),
        ("judge", "objective.temperature=0", "objective: temperature must be above 0, got 0"),
        ("clip", "model.imgae.channels=[8]", "unknown key model.imgae (did you mean 'image'?)"),
        ("judge", "model.channels=[8]", "unknown key model.channels"),
        ("prior", "objective.whitening_examples=1", "objective.whitening_examples must be at least 2, got 1"),
        ("prior_autoregressive", "objective.fit_examples=0", "objective.fit_examples must be at least 2, got 0"),
        ("decoder", "init_from=runs/emoji/decoder_32", "is not there yet: unclip train emoji/decoder_32, or init_from=null"),
    ],
)
def test_mistakes_in_other_stages_are_named(runs, tmp_path, monkeypatch, stage, override, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(f"tiny/{stage}", [*parts(stage, runs), f"output_dir={tmp_path / 'x'}", override])


def test_a_fine_tuned_clip_is_held_to_where_it_started(runs, tmp_path):
    """Not to what a text tower begins with: at a rate of 0 nothing has drifted, in a resumed run neither."""
    settings = (f"init_from={runs / 'clip'}", "learning_rate=0", "save_every=1", "batch_size=2")
    for steps in (1, 2):
        run_here("clip", tmp_path / "tuned", *settings, f"max_steps={steps}")
        assert json.loads((tmp_path / "tuned" / "log.jsonl").read_text().splitlines()[-1])["drift"] == 0
        shutil.rmtree(tmp_path / "tuned" / "final")


def test_a_clip_norm_of_0_never_clips(tmp_path):
    """It once made every gradient 0, and the run trained nothing and said nothing."""
    settings = ("max_steps=2", "batch_size=2", "warmup_steps=0")
    losses = []
    for norm in (0, 1e9):
        run = run_here("upsampler_256", tmp_path / str(norm), *settings, f"clip_norm={norm}")
        losses.append(json.loads((run / "log.jsonl").read_text().splitlines()[-1]))
    assert losses[0]["loss"] == losses[1]["loss"] and losses[0]["grad_norm"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="possible here")
def test_fp16_is_for_gpus(tmp_path):
    """Accelerate would leave the CPU at fp32 and say nothing."""
    (process,) = start("upsampler_256", tmp_path / "x", "precision=fp16")
    assert process.said() == "error: precision fp16 needs a GPU: choose bf16 or no\n" and process.returncode == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("option", "rtol"),
    [
        ("fused=false", 1e-5),
        ("gradient_checkpointing=true", 1e-5),
        pytest.param("compile=true", 1e-4, marks=pytest.mark.slow),
        ("precision=bf16", 5e-2),
    ],
)
def test_what_makes_it_faster_changes_no_result(tmp_path, option, rtol):
    runs = [run_here("upsampler_256", tmp_path / "plain", "max_steps=6"), tmp_path / "other"]
    if option.startswith("precision"):  # Accelerate keeps to one in a process
        finish(start("upsampler_256", runs[1], "max_steps=6", option))
    else:
        run_here("upsampler_256", runs[1], "max_steps=6", option)
    losses = [[json.loads(line)["loss"] for line in (r / "log.jsonl").read_text().splitlines()] for r in runs]
    assert losses[0] == pytest.approx(losses[1], rel=rtol) and losses[0][0] != losses[0][-1]


def test_numbers_with_exponents_are_numbers_and_no_is_a_word(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1e-4\nb: 2\nc: x1e4\n")
    assert load_config(tmp_path / "c.yaml", ["d=3e2", "e.f=true", "precision=no", "on=False"]) == {
        "precision": "no",
        "on": False,
        "a": 1e-4,
        "b": 2,
        "c": "x1e4",
        "d": 300.0,
        "e": {"f": True},
    }


@pytest.mark.parametrize(
    "config", [p for p in CONFIGS if p.parent.name != "accelerate"], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_configuration_fills_its_constructor(config):
    assert config.stem.startswith(read_config(config)[0].stage)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_sees_the_same_examples(processes):
    config = TrainConfig("x", "x", max_steps=3, batch_size=8 // processes, learning_rate=1.0, gradient_accumulation=2)
    shares = [list(GlobalBatches(config, 0, rank, processes)) for rank in range(processes)]
    for step in range(3):
        seen = [i for share in shares for batch in share[2 * step : 2 * step + 2] for i in batch]
        assert sorted(seen) == list(range(16 * step, 16 * step + 16))
    assert list(GlobalBatches(config, 2, 0, processes)) == shares[0][4:]


def test_the_learning_rate_warms_up_and_cools_down():
    config = TrainConfig("x", "x", max_steps=100, batch_size=1, learning_rate=1.0, warmup_steps=10, cooldown=0.2)
    rates = [config.learning_rate_at(s) for s in range(100)]
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


@pytest.mark.parametrize(
    "stage", [s if s in ("clip", "upsampler_256") else pytest.param(s, marks=pytest.mark.slow) for s in STAGES]
)
def test_two_processes_are_one_of_twice_the_batch_are_two_accumulated(tmp_path, run, runs, stage):
    common = ["max_steps=4", *parts(stage, runs)]
    common.append("eps=1e-4")  # Adam divides by a gradient's size: with 1e-8 it would enlarge the rounding of those near zero
    run_here(stage, tmp_path / "alone", *common, "batch_size=8")
    if stage == "clip":  # once as people start them
        settings = [f"configs/tiny/{stage}.yaml", *QUIET, *common, f"output_dir={tmp_path / 'two'}", "batch_size=4"]
        result = run(*TWO_PROCESSES, "train.py", *settings)
        assert result.returncode == 0, result.stderr
        said = result.stderr
    else:
        said = finish(start(stage, tmp_path / "two", *common, "batch_size=4", processes=2))
    assert "processes: 2," in said
    others = ["two"]
    if stage != "clip":  # its negatives are the batch
        run_here(stage, tmp_path / "accumulated", *common, "batch_size=4", "gradient_accumulation=2")
        others.append("accumulated")
    one = load_file(tmp_path / "alone" / "checkpoint-00000004" / "weights.safetensors")
    for other in others:
        found = load_file(tmp_path / other / "checkpoint-00000004" / "weights.safetensors")
        assert one.keys() == found.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


LONG_VALIDATION = """
import sys
import time
from datetime import timedelta
import torch.distributed.distributed_c10d as c10d
c10d.default_pg_timeout = timedelta(seconds=2)  # NCCL's own is ten minutes
from unclip.objectives.upsampler import UpsamplerObjective
from unclip.training import train
UpsamplerObjective.validate = lambda self: time.sleep(5)
train("configs/tiny/upsampler_256.yaml", sys.argv[1:])
"""


def test_the_others_wait_while_the_main_process_validates(tmp_path):
    (tmp_path / "long.py").write_text(LONG_VALIDATION)
    settings = ("max_steps=2", "validate_every=2")
    finish(start(str(tmp_path / "long.py"), tmp_path / "x", *settings, processes=2))
    assert (tmp_path / "x" / "final").is_dir()


@pytest.mark.slow
def test_accelerate_launches_the_same_script(tmp_path, run):
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    result = run(*launch, "train.py", "configs/tiny/upsampler_256.yaml", *QUIET, "max_steps=2", f"output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "processes: 1, device: cpu, dtype: no" in result.stderr and (tmp_path / "final").is_dir()


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_for_accelerate_are_valid(path):
    config = load_config_from_file(str(path))
    assert config.compute_environment == ComputeEnvironment.LOCAL_MACHINE
    assert config.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP)
