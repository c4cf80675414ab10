"""xformers' real front end over a CPU kernel, checked against the math reference. Run as a process of its own.

The front end checks layout, bias shape, dtype and alignment; `_check_bias_alignment` is what its CUDA kernels refuse by.
"""

import math

import torch
import torch.nn.functional as F
from xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase, Context, Gradients
from xformers.ops.fmha.cutlass import _check_bias_alignment

from unclip.attention import attention


def reference(query, key, value, bias):
    """[B, N, H, D] -> [B, N, H, D] and the log-sum-exp [B, H, N]."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


class Common:
    SUPPORTED_DEVICES = {"cpu"}
    SUPPORTED_DTYPES = {torch.float}
    SUPPORTED_MAX_K = 256
    SUPPORTED_ATTN_BIAS_TYPES = (type(None), torch.Tensor)
    SUPPORTS_DROPOUT = False
    OPERATOR = staticmethod(F.scaled_dot_product_attention)

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def not_supported_reasons(cls, d) -> list[str]:
        reasons = super().not_supported_reasons(d)
        _check_bias_alignment(reasons, d.attn_bias)
        return reasons


class Forward(Common, AttentionFwOpBase):
    NAME = "cpuF"

    @classmethod
    def apply(cls, inp, needs_gradient):
        calls.append(inp)
        out, lse = reference(inp.query, inp.key, inp.value, inp.attn_bias)
        return out, Context(out=out, lse=lse, op_bw=Backward) if needs_gradient else None


class Backward(Common, AttentionBwOpBase):
    NAME = "cpuB"

    @classmethod
    def apply(cls, ctx, inp, grad):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (inp.query, inp.key, inp.value)]
            out, _ = reference(*leaves, inp.attn_bias)
            dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        return Gradients(dq=dq, dk=dk, dv=dv)


calls = []


def masks(batch: int, heads: int, queries: int, keys: int, g: torch.Generator) -> dict:
    """Every kind of mask that prior and decoder, ours and diffusers', hand over."""
    padding = torch.arange(keys)[None] < torch.randint(1, keys + 1, (batch, 1), generator=g)
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    additive = (~padding).float() * -10000.0
    return {
        "none": None,
        "padding": padding[:, None, None],
        "causal": causal,
        "causal and padding": causal & padding[:, None, None] | torch.eye(queries, keys, dtype=torch.bool),
        "added to the scores": additive[:, None, None],
        "added to the scores of each head": additive[:, None, None].expand(batch, heads, queries, keys).contiguous(),
    }


def main() -> None:
    for batch, heads, queries, keys in ((2, 3, 81, 81), (1, 2, 16, 33), (3, 1, 64, 85), (2, 4, 8, 8)):
        g = torch.Generator().manual_seed(keys)
        shapes = ((batch, queries, heads, 16), (batch, keys, heads, 16), (batch, keys, heads, 16))
        for name, mask in masks(batch, heads, queries, keys, g).items():
            inputs = [torch.randn(s, generator=g) for s in shapes]
            results = []
            for backend, op in (("math", None), ("xformers", (Forward, Backward))):
                leaves = [t.clone().requires_grad_() for t in inputs]
                out = attention(*leaves, mask, backend, op)
                out.square().sum().backward()
                results.append([out.detach(), *(t.grad for t in leaves)])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            print(f"{queries} to {keys}, {heads} heads, {name}: equal")
    assert len(calls) == 24
    unaligned = torch.zeros(1, 1, 81, 81)
    assert any("stride" in r for r in Forward.not_supported_reasons(type(calls[0])(*inputs, attn_bias=unaligned)))


if __name__ == "__main__":
    main()
