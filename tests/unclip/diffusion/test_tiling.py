"""Tiles: they cover, they fade into each other, and what a network sees locally they leave unchanged."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.diffusion.tiling import ramp, spans, tiled


@settings(max_examples=200)
@given(
    length=st.integers(1, 400),
    tile=st.integers(4, 12).map(lambda n: 8 * n),
    share=st.floats(0, 0.45),
    multiple=st.sampled_from([1, 4, 8]),
)
def test_tiles_cover_every_pixel_with_weight(length, tile, share, multiple):
    length, overlap = 8 * -(-length // 8), int(share * tile)
    found = spans(length, tile, overlap, multiple)
    total = torch.zeros(length)
    for start, end in found:
        assert 0 <= start < end <= length and end - start <= tile and start % multiple == 0
        total[start:end] += ramp(start, end, length, overlap)
    assert total.min() > 0
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(b[0] <= a[1] - overlap for a, b in zip(found, found[1:], strict=False))


@settings(max_examples=25)
@given(height=st.integers(2, 12), width=st.integers(2, 12), layers=st.integers(1, 4), seed=st.integers(0, 9))
def test_equal_to_untiled_where_the_overlap_holds_the_receptive_field(height, width, layers, seed):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers)]).double()
    x = torch.randn(2, 3, 8 * height, 8 * width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(tiled(network, x, 40, 4 * layers, 8), network(x), rtol=0, atol=1e-9)


def test_memory_is_a_tiles():
    """The network never sees more than a tile at a time."""
    sizes = []
    tiled(lambda x: (sizes.append(tuple(x.shape[-2:])), x)[1], torch.rand(1, 3, 200, 80), 64, 16, 8)
    assert max(max(s) for s in sizes) == 64 and len(sizes) == 8


def test_no_seam_shows_where_tiles_disagree():
    """Two tiles that say 0 and 1 fade: no step between neighbours is larger than the ramp's own."""
    answers = iter([0.0, 1.0])
    image = tiled(lambda x: torch.full_like(x, next(answers)), torch.zeros(1, 1, 8, 112), 64, 16)
    assert image.diff(dim=-1).abs().max() < 0.25 and image[..., 0].max() == 0 and image[..., -1].min() == 1
