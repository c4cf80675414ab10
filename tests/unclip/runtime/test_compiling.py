"""Compiled networks draw the same; where there is no compiler, one line says so."""

import os

import pytest
import torch
from drawing import close, draw
from running import run_here

from unclip.pipelines import UnCLIPPipeline
from unclip.runtime.compiling import compiled, why_not
from unclip.runtime.config import ConfigError


@pytest.fixture
def traced(monkeypatch):
    """Networks are traced as for a compiler, and their graphs run as they are: seconds instead of minutes."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, mode=None, **kwargs: plain(m, backend="eager", **kwargs))
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
    assert graphs() == 4, "and again for two pictures"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_really_compiled_draws_the_same(tiny):
    wanted = draw(tiny)
    tiny.compile()
    close(draw(tiny), wanted, 1e-4)


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
    monkeypatch.setattr("unclip.training.trainer.why_not", lambda device: None)
    with pytest.raises(ConfigError, match="compile=true: no network of this stage is compiled, of text_encoder, image_encoder"):
        run_here("clip", tmp_path / "clip", "compile=true")
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
