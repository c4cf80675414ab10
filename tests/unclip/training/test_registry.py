"""The registry of objectives: a stage imports its own module alone, and its dummy batches look like real ones."""

import subprocess
import sys

import pytest
from conftest import ROOT
from torch.utils.data import default_collate

from unclip.runtime.config import load_config
from unclip.training.objectives import STAGES, Objective, create, objective_class

SHARED = {"base", "random_columns"}
CONDITIONED = {"conditioned", "frozen_clip"}
MODULES = {  # what a stage needs beside its own module
    "clip": {"contrastive"},
    "prior_autoregressive": CONDITIONED,
    "decoder": CONDITIONED | {"grounding", "icon_bank"},
    "upsampler_256": set(),
}


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.slow) if s in ("clip", "upsampler_256") else s for s in MODULES]
)
def test_a_stage_imports_its_own_objective_alone(stage):
    code = f"""
import sys
import unclip.training.trainer
from unclip.training.objectives import objective_class
objective_class({stage!r})
print(*(name.rpartition(".")[2] for name in sys.modules if name.startswith("unclip.training.objectives.")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    own = STAGES[stage].partition(".")[0]
    assert set(result.stdout.split()) - SHARED == MODULES[stage] | {own}


@pytest.mark.parametrize("stage", STAGES)
def test_objectives_are_at_most_two_levels_under_their_base(stage):
    made = objective_class(stage)
    assert made.__mro__.index(Objective) <= 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_dummy_batch_is_like_a_real_one(stage, clip):
    """It has the names, types and shapes of loaded examples, texts padded to the tower's length, and a loss."""
    path = ROOT / f"configs/tiny/{stage}.yaml"
    settings = [f"objective.clip={clip}"] if "clip" in (load_config(path).get("objective") or {}) else []
    objective = create(stage, load_config(path, settings), seed=0)
    objective.compiled = True  # texts of one length
    if stage == "decoder_distill":
        objective.base.compiled = True
        objective.adapt()
    if stage.startswith("prior"):
        objective.prepare()
    real = objective.to_tensors(default_collate([objective.examples[n] for n in range(3)]))
    dummy = objective.dummy_batch(3)
    for name, value in dummy.items():
        assert (name, value.shape, value.dtype) == (name, real[name].shape, real[name].dtype)
    objective.compute_loss({name: real[name] for name in dummy})  # of a real batch, the loss needs nothing else
    loss = objective.dummy_loss(dummy)
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()
    assert any(p.grad is not None for p in objective.trained_parameters().values())
