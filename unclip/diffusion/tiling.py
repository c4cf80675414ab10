"""Running a convolutional network on an image larger than memory allows: overlapping tiles, blended."""

# B batch, C channels, H height, W width

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(network: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, multiple: int = 1) -> Tensor:
    """`network(x)` [B, C, H, W] -> [B, C', H, W], computed on tiles of at most `tile` pixels a side.

    Neighbours share `overlap` pixels. A tile's outermost quarter of them is discarded, because the output there depends on
    the padding; over the middle half neighbours are blended linearly. Equal to the untiled output where the network's
    receptive field is at most a quarter of `overlap`. Tiles start at multiples of `multiple` (a network's stride).
    """
    height, width = x.shape[-2:]
    if height <= tile and width <= tile:
        return network(x)
    if not 0 <= overlap < tile // 2:
        raise ValueError(f"overlap must be from 0 to less than half a tile ({tile // 2}), got {overlap}")
    total, weights = torch.empty(0), torch.empty(0)
    for top, bottom in spans(height, tile, overlap, multiple):
        for left, right in spans(width, tile, overlap, multiple):
            output = network(x[..., top:bottom, left:right])
            if (top, left) == (0, 0):  # the first tile: only now are dtype and channels known
                total = output.new_zeros(*output.shape[:-2], height, width)
                weights = output.new_zeros(height, width)
            rows = ramp(top, bottom, height, overlap).to(output)
            columns = ramp(left, right, width, overlap).to(output)
            weight = rows[:, None] * columns
            total[..., top:bottom, left:right] += weight * output
            weights[top:bottom, left:right] += weight
    return total / weights


def spans(length: int, tile: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """Starts and ends of the tiles along one side, each at most `tile` long and sharing at least `overlap`."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(n * (length - tile) / (count - 1) / multiple) * multiple for n in range(count)]
    while any(a + tile - b < overlap for a, b in zip(starts, starts[1:], strict=False)):  # rounding opened a gap
        count += 1
        starts = [round(n * (length - tile) / (count - 1) / multiple) * multiple for n in range(count)]
    return [(start, min(start + tile, length)) for start in starts]


def ramp(start: int, end: int, length: int, overlap: int) -> Tensor:
    """A tile's weight along one side: 0 on the outer quarter of a shared border, rising to 1 over its middle half."""
    weight = torch.ones(end - start)
    if not overlap:
        return weight
    quarter = overlap // 4
    middle = overlap - 2 * quarter
    rise = torch.cat([torch.zeros(quarter), torch.linspace(0, 1, middle + 2)[1:-1], torch.ones(quarter)])
    if start > 0:
        weight[:overlap] *= rise
    if end < length:
        weight[-overlap:] *= rise.flip(0)
    return weight
