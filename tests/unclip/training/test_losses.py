"""Twenty steps of every tiny configuration lose what they lost when the curves in `tests/golden` were stored."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from losses import GOLDEN, STAGES, STEPS, curve

TOLERANCE = 1e-3  # relative; one machine's vector instructions against another's give up to 3e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, list[float]]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Where the runs are; CLIP and decoder, which others are trained on top of, are made first."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def curves(base) -> dict[str, list[float]]:
    return {stage: curve(stage, base / stage, base) for stage in STAGES}


def test_every_tiny_configuration_has_a_curve(golden):
    assert set(golden) == set(STAGES) == {p.stem for p in (ROOT / "configs" / "tiny").glob("*.yaml")}
    assert all(len(losses) == STEPS for losses in golden.values())


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_stored(curves, golden, stage):
    np.testing.assert_allclose(curves[stage], golden[stage], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_learning_rate_one_percent_higher_is_noticed(curves, base, golden, tmp_path, stage):
    other = curve(stage, tmp_path / "run", base, rate=1.01)
    assert other[0] == pytest.approx(golden[stage][0], rel=TOLERANCE), "the first loss knows no rate"
    assert not np.allclose(other, golden[stage], rtol=TOLERANCE, atol=0)
