"""Counting the work and memory of a training step without storage: floating-point operations and live bytes."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from decoder.blocks import ChannelNorm

from ..runtime.profiling import flop_counter
from .objectives import Objective

NORMS = (nn.GroupNorm, nn.LayerNorm, ChannelNorm)


@dataclass
class Measured:
    """One forward and backward pass: floating-point operations, and the bytes alive beside weights and gradients."""

    flops: int  # those of the frozen CLIP included
    frozen_flops: int  # of the frozen CLIP
    activations: int  # the most that is alive at once, without the parameters' gradients
    total: int  # the same with them


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors alive that were made inside it: now, and at most; with gradients set apart.

    `given` bytes are alive from the beginning.
    """

    def __init__(self, given: int = 0) -> None:
        super().__init__()
        self.now = self.most = self.most_with_gradients = given
        self.gradients = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        self.most_with_gradients = max(self.most_with_gradients, self.now + self.gradients)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size

    def accumulated(self, parameter: Tensor) -> None:
        """A gradient is complete: from here on it counts as one, not as an activation."""
        if parameter.grad is not None:
            self.gradients += parameter.grad.numel() * parameter.grad.element_size()
            parameter.grad = None


def measure(objective: Objective, size: int, dtype: torch.dtype | None, on_gpu: bool = False) -> Measured:
    """A forward pass on a dummy batch of `size`, and a backward pass where gradients are on, under autocast to `dtype`.

    Autocast on CUDA computes norms in fp32 and so keeps their inputs at twice the size; on a CPU it does not. `on_gpu`
    does as CUDA does.
    """
    with unset_fake_temporarily():  # indices are read
        batch = objective.dummy_batch(size)
    live = LiveBytes(sum(tensor.nbytes for tensor in batch.values()))
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(live.accumulated) for p in objective.trained_parameters().values()]
    if on_gpu and dtype:
        norms = [m for m in objective.modules() if isinstance(m, NORMS)]
        hooks += [m.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:])) for m in norms]
    try:
        with live, flop_counter() as flops, _frozen_flops(objective, flops) as frozen:
            with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                loss = objective.dummy_loss(batch)
            if torch.is_grad_enabled():
                loss.backward()
            del loss
    finally:
        for hook in hooks:
            hook.remove()
    return Measured(flops.get_total_flops(), sum(frozen), live.most, live.most_with_gradients)


@contextmanager
def _frozen_flops(objective: Objective, counter: Any) -> Iterator[list[int]]:
    """Collects the operations of each call of the frozen CLIP's towers."""
    found: list[int] = []
    hooks = []
    for tower in getattr(getattr(objective, "frozen", None), "towers", {}).values():
        hooks.append(tower.register_forward_pre_hook(lambda *_: found.append(-counter.get_total_flops())))
        hooks.append(tower.register_forward_hook(lambda *_: found.append(counter.get_total_flops())))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
