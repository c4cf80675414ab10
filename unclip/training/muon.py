"""Muon beside AdamW: hidden layers step along their orthogonalised momentum, all other weights as AdamW would have them."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned for its slope at zero (K. Jordan, 2024)
ITERATIONS = 5
ADAM_RMS = 0.2  # the size of AdamW's own updates, entry by entry (arXiv 2502.16982, section 2.2)


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `muon` true: orthogonalised Nesterov momentum (arXiv 2502.16982, algorithm 1).

    A convolution is the matrix [out, in * height * width]. An update is scaled to the root mean square of AdamW's, so that
    one learning rate serves both. `dtype` is what the orthogonalisation computes in. Processes that train one network (DDP)
    share the matrices out among them and tell each other what came of each.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype = torch.float32, **adamw):
        super().__init__(groups, **adamw)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients, todo = {}, []
        for group in self.param_groups:
            for parameter in group["params"] if group.get("muon") else ():
                gradient = gradients[parameter] = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
                state["step"] += 1
                state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                todo.append((parameter, group))
                parameter.grad = None  # AdamW passes over it
        count, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)
        todo.sort(key=lambda pair: _cost(pair[0]), reverse=True)  # what is done at the same time costs alike
        for first in range(0, len(todo), count):
            together = todo[first : first + count]
            updates = [torch.empty(len(p), p[0].numel(), dtype=self.dtype, device=p.device) for p, _ in together]
            if rank < len(together):
                mine = together[rank][0]
                updates[rank].copy_(self._update(mine, gradients[mine]))
            for turn, (update, (parameter, group)) in enumerate(zip(updates, together, strict=True)):
                if count > 1:
                    dist.broadcast(update, turn)
                scale = ADAM_RMS * max(update.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape).to(parameter.dtype), alpha=-group["lr"] * scale)
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Which way `parameter` goes, as the matrix that it is."""
        return orthogonalised(gradient.lerp(self.state[parameter]["momentum"], MOMENTUM).flatten(1).to(self.dtype))


def _cost(parameter: Tensor) -> int:
    """Of orthogonalising: in proportion to the multiplications."""
    return parameter.numel() * min(parameter.flatten(1).shape)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly U V^T of the `matrix` U S V^T [M, N]: singular values between about 0.7 and 1.2 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is matrix else x.T


def hidden_matrices(network: nn.Module) -> Iterator[str]:
    """Names of the weights that Muon is for: of the linear layers and convolutions inside lists of layers.

    The first and the last layer, embeddings, norms and biases are better left to AdamW.
    """
    for name, module in network.named_modules():
        for inner, layer in module.named_modules() if isinstance(module, nn.ModuleList) else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield f"{name}.{inner}.weight"
