"""A tiny judge, the shapes, and the command that evaluates the tiny model on them."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from unclip.data.icons import IconSet
from unclip.io.checkpoints import save_components
from unclip.runtime.config import load_config
from unclip.training.objectives import create


@pytest.fixture(scope="session")
def icons() -> IconSet:
    return IconSet.load("shapes")


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory) -> Path:
    config = load_config(ROOT / "configs/tiny/judge.yaml")
    torch.manual_seed(0)
    objective = create("judge", {k: config[k] for k in ("model", "data", "objective")}, seed=0)
    folder = tmp_path_factory.mktemp("judge")
    save_components(folder, objective.eval().components())
    return folder


@pytest.fixture
def evaluate(command, tiny_folder, tiny_judge):
    def call(out: Path, *more, model: Path = tiny_folder) -> tuple[int, str, str]:
        return command("evaluate", model, "--out", out, "--data", "shapes", "--judge", tiny_judge, "--limit", 8, *more)

    return call
