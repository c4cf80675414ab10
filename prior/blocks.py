"""Blocks that every stage may use: attention over [B, N, H, D], with the kernel set by the caller."""

# B batch, N query tokens, M key tokens, C channels, H heads, D channels of a head

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (query [B, N, H, D], key [B, M, H, D], value [B, M, H, D], mask [B or 1, 1, N or 1, M] bool, True = attend) -> [B, N, H, D]
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
ModuleT = TypeVar("ModuleT", bound=nn.Module)
# keys and values of the context, each [B, M, H, D], by attention layer
KeyValueCache = dict[nn.Module, tuple[Tensor, Tensor]]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled dot product attention in this module's layout: the default of every stage."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, H, N, D]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class Checkpointed:
    """A network whose blocks' activations can be computed again instead of stored (arXiv 1604.06174).

    Switched by diffusers' `enable_gradient_checkpointing` and `disable_gradient_checkpointing`.
    """

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def run(self, block: nn.Module, *args: object) -> Any:
        """`block(*args)`, its activations stored for the backward pass or, with gradient checkpointing, computed again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)  # type: ignore[attr-defined]  # diffusers sets it
        return block(*args)


class Attention(nn.Module):
    """Multi-head attention of `x` to itself and to an optional context, with normalised queries and keys.

    With a context the keys and values are [context, x] ("added" keys and values), one softmax over both, as in the
    decoder of GLIDE (arXiv 2112.10741, section 4) that DALL·E 2 builds on.
    """

    def __init__(self, channels: int, head_dim: int = 64, context_dim: int | None = None):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"channels ({channels}) must be a multiple of head_dim ({head_dim})")
        self.head_dim = head_dim
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_dim, 2 * channels) if context_dim else None
        self.query_norm = nn.LayerNorm(head_dim, bias=False)
        self.key_norm = nn.LayerNorm(head_dim, bias=False)
        self.out = zero_module(nn.Linear(channels, channels))
        self.function: AttentionFunction = sdpa

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The context's keys and values, each [B, M, H, D]: the same at every step of a denoising loop."""
        if self.context_kv is None:
            raise ValueError("this attention has no context: it was made without context_dim")
        key, value = self._heads(self.context_kv(context), 2)
        return self.key_norm(key), value

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        past: list[Tensor] | None = None,
        kv_cache: KeyValueCache | None = None,
        names: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`past` holds the keys and values of earlier tokens, [] of none; those of `x` are added to it.

        `kv_cache` has what `project_context` returns, by layer. With `names` [B, M], which are 1 and -1 for the context tokens
        of two names and 0 elsewhere, -> the output and `name_shares` [B, N].
        """
        query, key, value = self._heads(self.qkv(x), 3)  # each [B, N, H, D]
        key = self.key_norm(key)
        if past is not None:
            past[:] = [torch.cat(pair, 1) for pair in zip(past, (key, value), strict=True)] if past else [key, value]
            key, value = past
        if context is not None:
            context_key, context_value = self.project_context(context) if kv_cache is None else kv_cache[self]
            key = torch.cat([context_key, key], 1)  # [B, M + N, H, D]
            value = torch.cat([context_value, value], 1)
        query = self.query_norm(query)
        attended = self.function(query.to(value.dtype), key.to(value.dtype), value, mask)
        out = self.out(attended.flatten(2))  # [B, N, C]
        return out if names is None else (out, name_shares(query, key[:, : names.shape[1]], names))

    def _heads(self, projected: Tensor, parts: int) -> list[Tensor]:
        return [p.unflatten(-1, (-1, self.head_dim)) for p in projected.chunk(parts, -1)]


def name_shares(query: Tensor, key: Tensor, names: Tensor) -> Tensor:
    """Of what each query attends to two names, the share that the first one gets, all heads together: [B, N].

    `query` [B, N, H, D]; `key` [B, M, H, D] of the context tokens; `names` [B, M] has 1 for the first name's tokens, -1 for
    the second's, 0 elsewhere. A row without names has finite numbers that mean nothing.
    """
    scores = torch.einsum("bnhd,bmhd->bhnm", query.float(), key.float()) / math.sqrt(query.shape[-1])
    other = (names == 0) & (names != 0).any(1, keepdim=True)  # [B, M]
    shares = scores.masked_fill(other[:, None, None], -torch.inf).softmax(-1)
    return (shares * (names > 0)[:, None, None]).sum(-1).mean(1)


class Block(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, width: int, head_dim: int, dropout: float):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, head_dim)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))
        zero_module(self.mlp[-1])

    def forward(self, x: Tensor, mask: Tensor | None, past: list[Tensor] | None = None) -> Tensor:
        """`x` [B, N, C]; `mask` and `past` as `Attention` takes them."""
        x = x + self.attention(self.norm_attention(x), mask=mask, past=past)
        return x + self.mlp(self.norm_mlp(x))


def zero_module(module: ModuleT) -> ModuleT:
    """Set every parameter of `module` to zero; -> `module`."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def set_attention(model: nn.Module, function: AttentionFunction) -> None:
    """Make every `Attention` inside `model` use `function`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.function = function
