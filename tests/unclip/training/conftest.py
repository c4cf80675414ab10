"""Tiny runs that several stages are trained on top of."""

import pytest
from running import run_here


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return run_here("clip", tmp_path_factory.mktemp("clip"), "max_steps=1", "batch_size=2")


@pytest.fixture(scope="module")
def prior(clip, tmp_path_factory):
    return run_here("prior", tmp_path_factory.mktemp("prior"), f"objective.clip={clip}", "max_steps=1", "batch_size=2")
