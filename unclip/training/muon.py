"""Muon beside AdamW: hidden layers step along their orthogonalised momentum, all other weights as AdamW would have them."""

# K matrices of one shape, M rows, N columns

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

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
    one learning rate serves both. Matrices of one shape are orthogonalised as one batch, computed in `dtype`. Processes that
    train one network (DDP) share the matrices out among them and gather each other's updates.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype = torch.float32, **adamw: Any):
        super().__init__(groups, **adamw)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups if g.get("muon")]
        parameters = [p for _, members in groups for p in members]
        gradients = [p.grad for p in parameters]
        updates = iter(self._updates(self._directions(parameters, gradients)) if parameters else ())
        for group, members in groups:
            if members and group["weight_decay"]:
                torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
            if members:
                torch._foreach_add_(members, [next(updates) for _ in members], alpha=-group["lr"])
        for parameter in parameters:
            parameter.grad = None  # AdamW passes over it
        super().step()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _directions(self, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Nesterov momentum, with `gradients` taken in: what is to be orthogonalised."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_add_([self.state[p]["step"] for p in parameters], 1)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        return list(torch._foreach_lerp(gradients, momenta, MOMENTUM))

    def _updates(self, directions: list[Tensor]) -> list[Tensor]:
        """`directions` orthogonalised, in the size of AdamW's updates and in their own memory layouts."""
        directions = [d if _is_dense(d) else d.contiguous() for d in directions]
        # in the order of memory: a permutation of a matrix's columns permutes those of the result
        matrices = [d.as_strided((len(d), d.numel() // len(d)), (d.numel() // len(d), 1)) for d in directions]
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        updates = _orthogonalised_by_shape(matrices, self.dtype) if alone else self._shared_out(matrices)
        return [u.as_strided(d.shape, d.stride()) for u, d in zip(updates, directions, strict=True)]

    def _shared_out(self, matrices: list[Tensor]) -> list[Tensor]:
        """What `_orthogonalised_by_shape` answers, of which each process has computed a share."""
        count, rank = dist.get_world_size(), dist.get_rank()
        order = sorted(range(len(matrices)), key=lambda n: (_cost(matrices[n]), matrices[n].shape), reverse=True)
        shares = [order[first::count] for first in range(count)]  # shares cost alike, and every process deals alike
        sizes = [sum(matrices[n].numel() for n in share) for share in shares]
        mine = _orthogonalised_by_shape([matrices[n] for n in shares[rank]], self.dtype)
        sent = torch.zeros(max(sizes), dtype=self.dtype, device=matrices[0].device)
        if mine:
            torch.cat([m.flatten() for m in mine], out=sent[: sizes[rank]])
        received = sent.new_empty(count * max(sizes))
        dist.all_gather_into_tensor(received, sent)
        updates: dict[int, Tensor] = {}
        for share, part in zip(shares, received.to(matrices[0].dtype).split(max(sizes)), strict=True):
            lengths = [matrices[n].numel() for n in share]
            parts = part[: sum(lengths)].split(lengths)
            updates |= {n: flat.view(matrices[n].shape) for n, flat in zip(share, parts, strict=True)}
        return [updates[n] for n in range(len(matrices))]


def _is_dense(weight: Tensor) -> bool:
    """Whether the rows of a weight [out, ...] follow each other in memory, without gaps."""
    return weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _cost(matrix: Tensor) -> int:
    """Of orthogonalising: in proportion to the multiplications."""
    return matrix.numel() * min(matrix.shape)


def _orthogonalised_by_shape(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each of `matrices` orthogonalised in `dtype` and scaled to AdamW's updates, those of one shape together."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(number)
    updates: dict[int, Tensor] = {}
    for shape, numbers in by_shape.items():
        stacked = torch.stack([matrices[n] for n in numbers])
        found = orthogonalised(stacked.to(dtype)).to(stacked.dtype).contiguous()
        updates |= zip(numbers, found.mul_(ADAM_RMS * max(shape) ** 0.5).unbind(), strict=True)
    return [updates[n] for n in range(len(matrices))]


def orthogonalised(matrices: Tensor) -> Tensor:
    """Nearly U V^T of `matrices` U S V^T [K, M, N]: singular values between about 0.7 and 1.2 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def hidden_matrices(network: nn.Module) -> Iterator[str]:
    """Names of the weights that Muon is for: of the linear layers and convolutions inside lists of layers.

    The first and the last layer, embeddings, norms and biases are better left to AdamW.
    """
    for name, module in network.named_modules():
        for inner, layer in module.named_modules() if isinstance(module, nn.ModuleList) else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield f"{name}.{inner}.weight"
