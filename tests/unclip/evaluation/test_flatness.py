"""The statistics of flat areas, colours and pieces, on images whose numbers are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unclip.evaluation.metrics import colour_count, flat_share, gradient_magnitude, median, object_mask
from unclip.evaluation.parts.components import MIN_PIXELS, component_counts


def blocks() -> torch.Tensor:
    """White, with a block of 8x8 of one colour that has 6x3 of another within, [1, 3, 16, 16]."""
    image = torch.ones(1, 3, 16, 16)
    image[..., 4:12, 4:12] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    image[..., 5:11, 5:8] = torch.tensor([0.1, 0.2, 0.9])[:, None, None]
    return image


def test_an_object_is_what_is_darker_than_white_in_one_channel():
    image = blocks()
    assert object_mask(image).sum() == 64
    image[0, 2, 0, 0], image[0, 2, 0, 1] = 0.96, 0.98
    assert object_mask(image).sum() == 65


def test_a_step_is_the_root_of_both_differences_over_all_channels():
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0, 0, 1], image[0, 1, 1, 0] = 0.3, 0.4
    assert gradient_magnitude(image)[0, 0, 0].item() == pytest.approx(0.5)
    assert gradient_magnitude(image)[0, 0, 1].item() == pytest.approx(0.3) and gradient_magnitude(image)[0, 1, 1] == 0


def test_flat_is_what_has_no_edge_to_the_right_and_below():
    image = blocks()
    edges = 8 + 7  # the block's last row and column
    inner = 6 + 3 - 1 + 6 + 3  # the inner one's last row and column, and the pixels before its first ones
    assert flat_share(image).item() == pytest.approx((64 - edges - inner) / 64)
    assert flat_share(image + 0.015 * (torch.arange(16) % 2)).item() <= flat_share(image).item()
    assert flat_share(torch.ones(1, 3, 8, 8)).item() == 0


def test_colours_are_the_fewest_that_cover_nine_tenths():
    image = torch.ones(1, 3, 10, 10)
    image[0, :, :, :] = torch.tensor([0.0, 0.0, 0.0])[:, None, None]
    assert colour_count(image).item() == 1
    image[0, 0, 0, :] = 0.4  # a tenth: the other colour covers the rest
    assert colour_count(image).item() == 1
    image[0, 0, 1, 0] = 0.8
    assert colour_count(image).item() == 2
    image[0, 0, 1, 0] = 0.4 + 0.02  # the same of 16 levels
    assert colour_count(image).item() == 2
    assert colour_count(torch.ones(1, 3, 8, 8)).item() == 0


@given(st.integers(2, 16))
def test_as_many_equal_colours_as_there_are(count):
    levels = torch.arange(count) / 15
    image = torch.zeros(1, 3, count, 10)
    image[0, 1] = levels[:, None]
    assert colour_count(image).item() == -(-9 * count // 10)  # nine tenths of them, rounded up


def test_a_median_lies_in_its_interval():
    values = torch.tensor([1.0, 2, 3, 4, 100])
    found = median(values)
    assert found.value == 3 and found.low <= 3 <= found.high and found.n == 5
    assert median(torch.full((7,), 2.0)).high == 2


def drawn(*blocks: tuple[slice, slice]) -> torch.Tensor:
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    for rows, columns in blocks:
        image[..., rows, columns] = 10
    return image


def test_pieces_are_counted_as_they_touch():
    two = drawn((slice(2, 8), slice(2, 8)), (slice(9, 15), slice(9, 15)))
    diagonal = drawn((slice(2, 8), slice(2, 8)), (slice(8, 15), slice(8, 15)))
    assert component_counts(torch.cat([two, diagonal, drawn()])).tolist() == [2, 1, 0]
    speck = drawn((slice(2, 8), slice(2, 8)), (slice(20, 21), slice(20, 20 + MIN_PIXELS - 1)))
    piece = drawn((slice(2, 8), slice(2, 8)), (slice(20, 21), slice(20, 20 + MIN_PIXELS)))
    assert component_counts(torch.cat([speck, piece])).tolist() == [1, 2]


def test_a_winding_line_is_one_piece():
    image = drawn()
    for n in range(0, 30, 4):
        image[..., n, 1:31] = 0
        image[..., n : n + 5, 30 if n % 8 == 0 else 1] = 0
    assert component_counts(image).item() == 1
    assert component_counts(image.flip(-1)).item() == component_counts(image.transpose(-1, -2)).item() == 1
