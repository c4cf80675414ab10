"""Linear layers with weights in oneDNN's blocked layout, for many calls with few rows on a CPU.

Between a matrix-vector product and a large matrix product, torch's kernels use a fraction of the memory bandwidth: with the
six rows of one guided image in the prior, oneDNN's blocked layout is several times as fast.
"""

import copy

import torch
from torch import Tensor, nn

MOST_ROWS = 256  # above it the plain product is as fast


class PackedLinear(nn.Module):
    """A copy of `linear` with its weight in blocked layout, not to be trained or saved."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed(block: nn.Module, rows: int) -> nn.Module:
    """A copy of `block` with packed linear layers, for inputs of about `rows` rows; everything else is shared.

    `block` itself where packing does not help or apply: on other devices, in other dtypes than float32 and the bfloat16 of
    CPUs that multiply it, with many rows, under gradients, and with other kinds of linear layers (adapters).
    """
    if not torch.backends.mkldnn.is_available():  # then torch has none of these operations either
        return block
    dtypes = [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
    linear = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    weights = [m.weight for m in linear.values()]
    if (
        rows > MOST_ROWS
        or torch.is_grad_enabled()
        or any(type(m) is not nn.Linear for m in linear.values())
        or any(hasattr(m, "base_layer") for m in block.modules())
        or any(w.device.type != "cpu" or w.dtype not in dtypes for w in weights)
    ):
        return block
    shared = {id(t): t for t in (*block.parameters(), *block.buffers())}
    light = copy.deepcopy(block, shared)
    for name, layer in linear.items():
        parent, _, leaf = name.rpartition(".")
        setattr(light.get_submodule(parent), leaf, PackedLinear(layer, rows))
    return light
