"""What a piece of code asks a device for: the operations that it dispatches, and where it makes the host wait."""

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that answer with a Python value, or whose output's shape depends on values.
READING = {
    *("_local_scalar_dense", "is_nonzero", "equal"),
    *("nonzero", "argwhere", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_dim_consecutive", "unique_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPYING = {"_to_copy", "copy_"}
BOOLEANS = (torch.bool, torch.uint8)  # as an index: a mask


class Operations(TorchDispatchMode):
    """Counts the operations dispatched while it is on, those of the backward pass included.

    `operations` has how often each was dispatched; an operation on lists of tensors ("foreach") counts once, and so does a
    view. `host_reads` has one line for each that makes the host wait for `device_type` ("cpu" too, so that what a GPU would
    be waited for shows without one): a value read by Python, a shape that depends on values, as of a boolean index, and a
    copy to the device or from it that blocks. Nothing is seen inside of a compiled graph, which cannot hold any of these.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.operations: Counter[str] = Counter()
        self.host_reads: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found, name = function(*args, **kwargs), function.overloadpacket.__name__
        self.operations[name] += 1
        if self._waits(name, args, kwargs, found):
            self.host_reads.append(f"aten::{name} at {_caller()}")
        return found

    def _waits(self, name: str, args: tuple, kwargs: dict[str, Any], found: Any) -> bool:
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if name in COPYING:
            source = args[1] if name == "copy_" else args[0]
            target = args[0] if name == "copy_" else found
            blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            here, there = (tensor.device.type == self.device_type for tensor in (source, target))
            return here != there and (blocks or here)
        if not any(t.device.type == self.device_type for t in tensors):
            return False
        if name in INDEXING:
            return any(isinstance(i, Tensor) and i.dtype in BOOLEANS for i in args[1])
        sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
        return name in READING and not sized


def _caller() -> str:
    """File and line of the code that is asking, outside of torch: its innermost frame."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "/torch/" not in file:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"
