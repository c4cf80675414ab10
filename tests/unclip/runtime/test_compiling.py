"""Compiled networks draw the same; where there is no compiler, one line says so."""

import json
import os

import pytest
import torch
from drawing import close, draw
from running import run_here
from torch.utils.data import default_collate

from unclip.pipelines import UnCLIPPipeline
from unclip.runtime.compiling import compiled, why_not
from unclip.runtime.config import ConfigError, load_config
from unclip.training.objectives import create


@pytest.fixture
def traced(monkeypatch):
    """Networks and losses are traced as for a compiler, and their graphs run as they are: seconds instead of minutes."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **kwargs: plain(f, backend="eager", **kwargs))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_draws_the_same_by_one_graph_a_shape(tiny, traced):
    texts = [draw(tiny, subject=[text]) for text in ("a star", "a very long sentence about two red rings")]
    tiny.compile()
    for wanted, text in zip(texts, ("a star", "a very long sentence about two red rings"), strict=True):
        close(draw(tiny, subject=[text]), wanted, 1e-5)
    assert graphs() == 2, "the decoder and the upsampler, of whatever length the text is"
    draw(tiny, subject=["a star"] * 2)
    assert graphs() == 4, "and again for two images"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_really_compiled_draws_the_same(tiny):
    wanted = draw(tiny)
    tiny.compile()
    close(draw(tiny), wanted, 1e-4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return run_here("clip", tmp_path_factory.mktemp("clip"), "max_steps=1", "batch_size=2")


GROUNDED = ("objective.grounding=1", "model.positions=true", "data.kinds=[relation, single, colour]")
GROUNDED += ("model.text_proj={text_layers: 1, text_head_dim: 16, text_images: true}",)
VARIANCE = ("model.out_channels=6", "model.in_channels=7", "objective.prediction_type=epsilon", "objective.min_snr=5")
LOSSES = [("clip", ("objective.anchor=1",)), ("prior", ()), ("decoder", GROUNDED)]
OTHERS = [("decoder", VARIANCE), ("prior_autoregressive", ()), ("upsampler_1024", ())]


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        *(*LOSSES, ("text_proj", ()), ("judge", ()), ("upsampler_256", ())),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS),
    ],
)
def test_a_stages_loss_is_one_graph(clip, traced, stage, settings):
    """Frozen towers, noise, networks, loss and metrics, however long the captions: traced once, without a break."""
    named = [f"objective.clip={clip}"] if "clip" in load_config(f"tiny/{stage}").get("objective", {}) else []
    config = load_config(f"tiny/{stage}", [*named, *settings])
    objective = create(stage, {k: config.get(k) or {} for k in ("model", "data", "objective")}, 0)
    batches = [default_collate([objective.examples[n] for n in range(first, first + 4)]) for first in (0, 4, 8)]
    torch.manual_seed(0)
    for parameter in objective.trained.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    eager = [objective(batch) for batch in batches]
    objective.compile_networks()
    for batch, (loss, metrics) in zip(batches, eager, strict=True):
        found, others = objective(batch)
        torch.testing.assert_close(found, loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(others, metrics, rtol=0, atol=1e-5, equal_nan=True)
        found.backward()
    assert graphs() == 1 and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "settings"), LOSSES)
def test_really_compiled_runs_are_the_eager_ones(clip, tmp_path, stage, settings):
    named = [f"objective.clip={clip}"] if stage != "clip" else []
    runs = [tmp_path / compile for compile in ("true", "false")]
    for run in runs:
        run_here(stage, run, *named, *settings, "max_steps=3", "batch_size=4", "optimizer=muon", f"compile={run.name}")
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys() and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_what_switches_its_adapter_is_not_compiled(clip):
    config = load_config("tiny/decoder_distill", [f"objective.clip={clip}"])
    objective = create("decoder_distill", {k: config.get(k) or {} for k in ("model", "data", "objective")}, 0)
    with pytest.raises(ConfigError, match="compile=true does not go with the stage decoder_distill"):
        objective.compile_networks()


def test_without_a_compiler_one_line_says_what_is_missing(tiny, tiny_folder, monkeypatch, command, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert why_not().startswith("there is no C++ compiler (g++ or clang++)")
    with pytest.raises(ValueError, match="cannot be compiled: there is no C"):
        tiny.compile()
    code, out, said = command("generate", "a star", "--model", tiny_folder, "--out", tmp_path / "x.png", "--compile")
    assert code == 2 and not out and said.startswith("error: the networks cannot be compiled") and said.count("\n") == 1
    with pytest.raises(ConfigError, match="compile=true: there is no C"):
        run_here("upsampler_256", tmp_path / "run", "compile=true")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "(no-such-compiler)" in why_not()
    assert why_not("mps") == "there is no compiler for the device mps"


def test_compiling_needs_the_weights_to_stay(tiny_folder):
    frugal = UnCLIPPipeline.from_pretrained(tiny_folder, low_memory=True)
    with pytest.raises(ValueError, match="compiling needs the weights to stay in memory"):
        frugal.compile()


def test_what_a_killed_compilation_left_is_not_loaded(tmp_path, monkeypatch, traced):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    broken, whole, fresh = (tmp_path / "ab" / f"{name}.so" for name in ("broken", "whole", "fresh"))
    for library in (broken, whole, fresh):
        library.write_bytes(b"" if library != whole else b"\x7fELF")
    for library in (broken, whole):
        os.utime(library, (0, 0))
    compiled(torch.nn.Linear(2, 2))
    assert not broken.exists() and whole.exists() and fresh.exists()
