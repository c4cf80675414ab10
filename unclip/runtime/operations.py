"""Counting the operations that code dispatches to a device, and finding where it synchronises the host with the device."""

import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that return a Python value, or whose output's shape depends on values.
READING = {
    *("_local_scalar_dense", "is_nonzero", "equal"),
    *("nonzero", "argwhere", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_dim_consecutive", "unique_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPYING = {"_to_copy", "copy_"}
BOOLEANS = (torch.bool, torch.uint8)  # as an index: a mask


class Operations(TorchDispatchMode):
    """Counts the operations dispatched while it is active, those of the backward pass included.

    `operations` has the count of each; an operation on lists of tensors ("foreach") counts once, and so does a view.
    `host_reads` has one line for each that synchronises the host with `device_type` ("cpu" too, so that tests need no
    GPU): a value read by Python, a shape that depends on values, as of a boolean index, and a blocking copy to the device
    or from it. Compiled graphs, which cannot hold any of these, are not observed.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.operations: Counter[str] = Counter()
        self.host_reads: list[str] = []

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found, name = function(*args, **kwargs), function.overloadpacket.__name__
        self.operations[name] += 1
        if self._synchronises(name, args, kwargs, found):
            self.host_reads.append(f"aten::{name} at {_caller()}")
        return found

    def _synchronises(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> bool:
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
    """File and line of the innermost frame outside of torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "/torch/" not in file:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"
