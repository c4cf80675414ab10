"""Linear layers that are called many times with few rows, on a CPU: their weights laid out once as oneDNN wants them.

Between a matrix-vector product and a large matrix product torch's own ways are far from the memory's speed: with the six
rows of a guided picture's prior the weights pass several times as fast in oneDNN's blocked layout.
"""

import copy

import torch
from torch import Tensor, nn

MOST_ROWS = 256  # past that the plain product is as fast


class PackedLinear(nn.Module):
    """`linear` as it is now: a copy of its weight in blocked layout, not to be trained or saved."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed(block: nn.Module, rows: int) -> nn.Module:
    """`block` with packed linear layers, for inputs of about `rows` rows; the rest of it is shared.

    Itself where nothing is to be won: on other devices, in other dtypes than float32 and the bfloat16 of CPUs that can
    multiply it, with many rows, under gradients, and with layers of another kind, as adapters are.
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
