"""A pretend accelerator: its tensors keep their data on the CPU, say that they are elsewhere, and don't meet the CPU's.

That is CUDA's rule, so that what a GPU would refuse is refused without one. Forward passes only.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # any that is not the CPU


class Elsewhere(Tensor):
    """A tensor of the pretend accelerator; `data_here` is what it holds."""

    @staticmethod
    def __new__(cls, here: Tensor):
        made = Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE)
        made.data_here = here
        return made

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("a tensor elsewhere has no numpy array")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """While it is on, tensors can be made on and moved to `DEVICE`; without `doubles`, as on Apple's GPUs, none in float64."""

    def __init__(self, doubles: bool = True):
        super().__init__()
        self.doubles = doubles

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = _run(function, args, kwargs or {})
        if not self.doubles and any(isinstance(v, Elsewhere) and v.dtype == torch.float64 for v in tree_leaves(found)):
            raise TypeError(f"{function}: the device has no float64")
        return found


class Waits(PretendDevice):
    """Counts how often Python waits for the device: it reads a number there, or copies to it or from it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found, name = super().__torch_dispatch__(function, types, args, kwargs), function.overloadpacket.__name__
        came, went = (any(isinstance(v, Elsewhere) for v in tree_leaves(tensors)) for tensors in ((args, kwargs), found))
        reads = came and name in ("_local_scalar_dense", "is_nonzero", "equal")
        self.count += reads or (name == "_to_copy" and came != went)
        return found


def _here(value):
    return value.data_here if isinstance(value, Elsewhere) else value


def _run(function, args, kwargs):
    name = function.overloadpacket.__name__
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    known = {id(value.data_here): value for value in tensors if isinstance(value, Elsewhere)}
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    goes = torch.device(asked).type == DEVICE.type if asked is not None else bool(known)
    moves = name in ("_to_copy", "copy_", "_local_scalar_dense", "is_nonzero", "equal")  # to a device, and to Python
    picks = name in ("index", "index_put_", "_index_put_impl_", "_unsafe_index") and isinstance(args[0], Elsewhere)
    strangers = [list(t.shape) for t in tensors if not isinstance(t, Elsewhere) and t.ndim]
    if known and strangers and not (moves or picks):
        raise RuntimeError(f"aten::{name}: tensors of two devices, on the CPU {strangers}")
    found = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name.endswith("_") and not name.startswith("_"):
        return args[0]
    if name in ("_local_scalar_dense", "is_nonzero", "equal") or not goes:
        return found
    return tree_map(lambda v: known.get(id(v)) or Elsewhere(v) if isinstance(v, Tensor) else v, found)
