"""Which dtype a CPU is given."""

import pytest
import torch

from unclip.runtime.precision import fast_dtype, slowdown


def test_a_dtype_is_timed_beside_float32():
    assert slowdown(torch.float64) > 0.5 and 0.2 < slowdown(torch.float32) < 5


def test_this_machines_dtype_is_not_the_slower_one():
    """Whatever CPU this is: bfloat16 is at least not much slower where it is chosen, measured again."""
    slowdown.cache_clear()
    assert fast_dtype("cpu") == torch.float32 or slowdown(torch.bfloat16) < 1.5


@pytest.mark.parametrize(
    ("tiles", "vectors", "factor", "chosen"),
    [
        (True, True, None, torch.bfloat16),  # AMX: no need to time it
        (False, True, 0.5, torch.bfloat16),  # as AMD's processors are
        (False, True, 1.8, torch.float32),  # as Intel's are with AMX hidden
        (False, False, None, torch.float32),
    ],
)
def test_bfloat16_only_where_it_is_faster(tiles, vectors, factor, chosen, monkeypatch):
    def timed(dtype: torch.dtype) -> float:
        assert factor is not None, "timed where the instructions say it already"
        return factor

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors)
    monkeypatch.setattr("unclip.runtime.precision.slowdown", timed)
    assert fast_dtype("cpu") == chosen
