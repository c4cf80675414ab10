"""A run that was killed and started again is the unbroken run, bit by bit; what can go wrong on the way is one line."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image
from running import QUIET, finals, finish, kill, launch, run_here, start, state

from unclip.io.checkpoints import DiskFull, checkpoints, load_checkpoint, save_checkpoint
from unclip.runtime.config import ConfigError
from unclip.training.divergence import DivergenceMonitor
from unclip.training.trainer import Trainer

try:
    import resource
except ImportError:  # Windows
    resource = None

limits_sizes = pytest.mark.skipif(resource is None, reason="this system has no limits of a file's size")


def assert_same_run(one, other):
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
    assert finals(one) == finals(other)


def test_killed_in_the_middle_of_a_save(tmp_path):
    settings = ("max_steps=8", "save_every=2")
    unbroken = run_here("upsampler_256", tmp_path / "unbroken", *settings)
    broken = tmp_path / "broken"
    kill(start("upsampler_256", broken, *settings), lambda: any(broken.glob("checkpoint-0000000[4-8].partial")))
    assert not (broken / "final").exists()
    said = finish(start("upsampler_256", broken, *settings))
    assert "resuming at step" in said and "damaged" not in said
    assert_same_run(unbroken, broken)
    rows = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 9)), "no step is logged twice"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images, of which one is held out: an epoch of nine examples."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((256, 256)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"squares {number}")
    return folder


MOMENTS = {
    "mid-save": (("save_every=2",), "checkpoint-0000000[4-6].partial", 0.0),
    "mid-epoch": (("save_every=3",), "checkpoint-00000003", 0.02),
    "mid-accumulation": (("save_every=3", "gradient_accumulation=4"), "checkpoint-00000003", 0.05),
    "after-a-save": (("save_every=1", "keep=1"), "checkpoint-00000005", 0.0),
    "while-pruning": (("save_every=1", "keep=1"), "checkpoint-*.old.partial", 0.0),
    "epoch's-end": (("save_every=9",), "checkpoint-00000009", 0.0),
    "while-finishing": (("save_every=4",), "final.partial", 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(tmp_path, images, processes, moment):
    settings, pattern, delay = MOMENTS[moment]
    settings = (*settings, f"batch_size={2 // processes}", f"data.path={images}", "max_steps=20", "workers=1")
    finish(start("upsampler_256", tmp_path / "unbroken", *settings, processes=processes))
    broken = tmp_path / "broken"
    kill(start("upsampler_256", broken, *settings, processes=processes), lambda: any(broken.glob(pattern)), delay)
    finish(start("upsampler_256", broken, *settings, processes=processes))
    assert_same_run(tmp_path / "unbroken", broken)


SLOW_COMPILER = """
import sys, time
import torch
from unclip.training import trainer

def compile(function, **kwargs):
    def first_call(*arguments):
        print("compiling", file=sys.stderr, flush=True)
        open(sys.argv[1], "w").close()
        try:
            time.sleep(600)
        except Exception as error:
            raise RuntimeError("the compiler failed") from error
    return first_call

torch.compile = compile
trainer.why_not = lambda device: None
trainer.train("configs/tiny/upsampler_256.yaml", sys.argv[2:])
"""


def test_a_signal_is_not_kept_waiting_by_the_first_compile(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_COMPILER)
    command = [str(tmp_path / "slow.py"), str(tmp_path / "began"), *QUIET, f"output_dir={tmp_path / 'run'}", "compile=true"]
    (process,) = launch(command, 1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline and process.returncode is None
        time.sleep(0.01)
    process.terminate()
    said = process.said(60)
    assert (
        process.returncode == 0 and "stopped at step 0; the same command goes on from here" in said and "Traceback" not in said
    )
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_dropout_is_the_same_after_a_resume(tmp_path):
    settings = ("max_steps=4", "save_every=1", "batch_size=2", "model.image.dropout=0.3")
    unbroken = run_here("clip", tmp_path / "unbroken", *settings)
    broken = run_here("clip", tmp_path / "broken", *settings, stop_at=2)
    assert not (broken / "final").exists()
    assert_same_run(unbroken, run_here("clip", broken, *settings))


def test_a_damaged_newest_checkpoint_is_reported_and_skipped(tmp_path, capsys):
    settings = ("max_steps=4", "save_every=2", "keep=1")
    run_here("upsampler_256", tmp_path, *settings[:2])
    newest, older = checkpoints(tmp_path)
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    before = finals(tmp_path)
    shutil.rmtree(tmp_path / "final")
    capsys.readouterr()
    run_here("upsampler_256", tmp_path, *settings)
    said = capsys.readouterr().err
    assert f"damaged checkpoint, now {newest.name}.damaged: {weights} is truncated" in said and "resuming at step 2" in said
    assert finals(tmp_path) == before
    assert checkpoints(tmp_path) == [newest] and not older.exists(), "the damaged one does not count as one that is kept"
    assert (tmp_path / f"{newest.name}.damaged").is_dir()


def test_a_checkpoint_of_another_configuration_is_one_line(tmp_path):
    run_here("upsampler_256", tmp_path, "max_steps=1")
    shutil.rmtree(tmp_path / "final")
    with pytest.raises(ConfigError, match="the checkpoint of step 1 in .* does not fit this configuration: size mismatch"):
        run_here("upsampler_256", tmp_path, "max_steps=2", "model.channels=[8,8]")


@limits_sizes
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """And what is written is what was there when it was begun, however late that is."""
    settings = ("max_steps=4", "save_every=2", "batch_size=1")
    plain = run_here("upsampler_256", tmp_path / "plain", *settings)
    reached, steps = threading.Event(), []
    take = Trainer.train_step

    def train_step(trainer, batches):
        passes = take(trainer, batches)
        if trainer.step == 4:
            reached.set()
        return passes

    def save(folder, tensors, state):
        steps.append((state["step"], reached.wait(60)))
        save_checkpoint(folder, tensors, state)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr("unclip.training.checkpointer.save_checkpoint", save)
    late = run_here("upsampler_256", tmp_path / "late", *settings)
    assert steps == [(2, True), (4, True)] and finals(late) == finals(plain)
    for name in ("checkpoint-00000002", "checkpoint-00000004"):
        one, other = (load_checkpoint(run / name)[0] for run in (plain, late))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[kind][key], other[kind][key]) for kind in one for key in one[kind])


def test_a_checkpoint_that_fails_in_the_background_ends_the_run_in_one_line(tmp_path, monkeypatch):
    def save(folder, tensors, state):
        raise DiskFull(f"{folder.name} needs more room")

    monkeypatch.setattr("unclip.training.checkpointer.save_checkpoint", save)
    with pytest.raises(DiskFull, match=r"^step 4: checkpoint-00000002 needs more room; last checkpoint: none$"):
        run_here("upsampler_256", tmp_path, "max_steps=8", "save_every=2", "batch_size=1")
    assert not (tmp_path / "final").exists()


def test_where_there_is_no_room_the_checkpoint_before_survives(tmp_path):
    def save(step: int, size: int) -> None:
        tensors = {"weights": {"a": torch.full((size,), float(step))}, "ema": {"a": torch.ones(size)}}
        save_checkpoint(tmp_path / f"checkpoint-{step:08d}", tensors, {"step": step})

    save(1, 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"checkpoint-00000002 needs .* MB: file too large, .* MB are missing"):
            save(2, 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]
    loaded, kept = load_checkpoint(tmp_path / "checkpoint-00000001")
    assert kept == {"step": 1} and torch.equal(loaded["weights"]["a"], torch.ones(1000))
    with pytest.raises(DiskFull, match=r"needs .* GB and .* are free: .* GB are missing"):
        tensors = {"weights": {"a": torch.empty(1, device="meta").expand(2**50)}}  # nobody has that much
        save_checkpoint(tmp_path / "checkpoint-00000003", tensors, {})


FULL = """
import sys, torch
from pathlib import Path
from unclip.checkpoints import DiskFull, load_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
tensors = {"weights": {"a": torch.ones(200_000)}}
save_checkpoint(folder / "checkpoint-00000001", tensors, {})
try:
    save_checkpoint(folder / "checkpoint-00000002", tensors, {})
except DiskFull as error:
    print(error)
load_checkpoint(folder / "checkpoint-00000001")
print(sorted(p.name for p in folder.iterdir()))
"""


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path):
    inside = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside]
    if subprocess.run([*command[:-1], f"mount -t tmpfs none {tmp_path}"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert said.stdout.splitlines()[-1] == "['checkpoint-00000001']", said.stderr
    assert "are free" in said.stdout and "are missing" in said.stdout


@limits_sizes
@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_in_one_line(tmp_path):
    limit = (20_000, resource.RLIM_INFINITY)
    result = subprocess.run(
        [sys.executable, "train.py", "configs/tiny/upsampler_256.yaml", *QUIET, f"output_dir={tmp_path}", "max_steps=2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "missing; last checkpoint: none" in result.stderr.splitlines()[-1]


def test_an_exploding_loss_stops_before_the_weights_change(tmp_path):
    settings = ("max_steps=60", "save_every=1", "keep=3", "batch_size=1", "learning_rate=0")
    with pytest.raises(FloatingPointError) as caught:
        run_here("upsampler_256", tmp_path, *settings, "explosion=1.01")
    said = str(caught.value)
    step = int(said.split("step ")[1].split()[0])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert step > 20 and rows[-1]["step"] == step - 1, "the step is not taken"
    losses = sorted(r["loss"] for r in rows)
    assert max(losses[:20]) <= losses[-1]
    assert "times the median before it" in said and f"on samples {step - 1}-{step - 1};" in said
    last = f"checkpoint-{step - 2:08d}"
    assert f"checkpoint-{step - 1:08d}.suspect" in said and said.endswith(f"last good checkpoint: {tmp_path / last}")
    assert checkpoints(tmp_path)[0].name == last and load_checkpoint(tmp_path / last)[1]["step"] == step - 2
    with pytest.raises(FloatingPointError, match=f"the loss of step {step} is"):
        run_here("upsampler_256", tmp_path, *settings, "explosion=1.01")  # nor is it by who goes on


def test_a_diverged_run_is_one_line(command, tmp_path):
    settings = ("learning_rate=1e30", "clip_norm=1e30", "warmup_steps=0", "save_every=1", f"output_dir={tmp_path}", *QUIET)
    code, _, said = command("train", ROOT / "configs/tiny/upsampler_256.yaml", *settings)
    assert code == 1 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the loss of step 2 is not finite, on samples 2-3; checkpoint-00000001.suspect")
    assert last.endswith("last good checkpoint: none")


def test_a_device_is_asked_for_its_losses_with_the_log(command, tmp_path, monkeypatch):
    """And before a checkpoint: what went wrong is told as if seen at once, and nothing is kept of the steps since."""
    monkeypatch.setattr(DivergenceMonitor, "checks_every_step", property(lambda monitor: False, lambda *_: None), raising=False)
    settings = ("learning_rate=1e30", "clip_norm=1e30", "warmup_steps=0", "max_steps=100", *QUIET)
    for name, more in {"logged": ("log_every=5",), "saved": ("log_every=50", "save_every=3")}.items():
        run = tmp_path / name
        code, _, said = command("train", ROOT / "configs/tiny/upsampler_256.yaml", *settings, *more, f"output_dir={run}")
        assert code == 1 and "Traceback" not in said
        last = said.strip().splitlines()[-1]
        assert last == "error: the loss of step 2 is not finite, on samples 2-3; last good checkpoint: none"
        assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1]
        assert not list(run.glob("checkpoint-*"))


def test_two_runs_never_share_a_folder(tmp_path):
    settings = ("save_every=1", "workers=1")
    first = start("upsampler_256", tmp_path, *settings, "max_steps=100000")
    taken = f"{tmp_path} is being trained in by process {first[0].pid} on {socket.gethostname()}: stop that run, or "
    try:
        deadline = time.monotonic() + 120
        while not checkpoints(tmp_path):
            assert time.monotonic() < deadline and first[0].returncode is None
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=re.escape(taken)):
            run_here("upsampler_256", tmp_path, *settings, "max_steps=2")
        second = start("upsampler_256", tmp_path, *settings, "max_steps=2", processes=2)
        said = [process.said(120) for process in second]
        assert taken in said[0] and not any("Traceback" in text for text in said)
        assert all(process.returncode for process in second)
    finally:
        kill(first, lambda: True)
    step = int(checkpoints(tmp_path)[0].name[-8:])
    run_here("upsampler_256", tmp_path, *settings, f"max_steps={step + 1}")
    assert (tmp_path / "final").is_dir(), "the claim went with the process that was killed, though its worker may live on"
