"""xformers' real front end over a CPU kernel, checked against the math reference. Run as a process of its own.

The front end checks layout, bias shape, dtype and alignment; `_check_bias_alignment` is what its CUDA kernels refuse by.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import karlo
import torch
import torch.nn.functional as F
from conftest import randomise, tiny_networks
from torch import Tensor, nn
from xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase, Context, Gradients
from xformers.ops.fmha.cutlass import _check_bias_alignment

from decoder import UnCLIPTextProjModel
from prior import AutoregressivePrior
from prior.cache import predictor
from unclip.runtime import attention as module
from unclip.runtime.attention import attention, install

TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 4e-3)}


def reference(query, key, value, bias):
    """[B, N, H, D] -> [B, N, H, D] and the log-sum-exp [B, H, N]."""
    q, k, v = (t.transpose(1, 2).float() for t in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).to(query.dtype), scores.logsumexp(-1)


class Common:
    SUPPORTED_DEVICES = {"cpu"}
    SUPPORTED_DTYPES = {torch.float, torch.half}
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
    for dtype in TOLERANCES:
        for sizes in ((2, 3, 81, 81), (1, 2, 16, 33), (3, 1, 64, 85), (2, 4, 8, 8)):
            check_masks(dtype, *sizes)
    assert len(calls) == 48
    unaligned, inputs = torch.zeros(1, 1, 81, 81), (calls[0].query, calls[0].key, calls[0].value)
    assert any("stride" in r for r in Forward.not_supported_reasons(type(calls[0])(*inputs, attn_bias=unaligned)))
    module.why_not = lambda backend: None
    through_xformers = module._xformers
    module._xformers = lambda query, key, value, mask, op: through_xformers(query, key, value, mask, (Forward, Backward))
    with tempfile.TemporaryDirectory() as folder:
        for name, (networks, answer) in stages(Path(folder)).items():
            check_networks(name, networks, answer)


def check_masks(dtype: torch.dtype, batch: int, heads: int, queries: int, keys: int) -> None:
    g = torch.Generator().manual_seed(keys)
    shapes = ((batch, queries, heads, 16), (batch, keys, heads, 16), (batch, keys, heads, 16))
    for name, mask in masks(batch, heads, queries, keys, g).items():
        inputs = [torch.randn(s, generator=g).to(dtype) for s in shapes]
        results = []
        for backend, op, kind in (("math", None, torch.float32), ("xformers", (Forward, Backward), dtype)):
            leaves = [t.clone().to(kind).requires_grad_() for t in inputs]
            out = attention(*leaves, mask, backend, op)
            out.square().sum().backward()
            results.append([out.detach().float(), *(t.grad.float() for t in leaves)])
        for ours, theirs in zip(*results, strict=True):
            scale = float(ours.abs().max().clamp_min(1)) if dtype != torch.float32 else 1.0
            rtol, atol = TOLERANCES[dtype]
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=scale * atol)
        print(f"{queries} to {keys}, {heads} heads, {name}, {dtype}: equal")


def stages(folder: Path) -> dict[str, tuple[list[nn.Module], Callable[[], list[Tensor]]]]:
    """Every network that attends, with answers of it under the masks that it makes itself."""
    g = torch.Generator().manual_seed(0)
    ours, stock = tiny_networks(), karlo.parts(folder)
    project = randomise(
        UnCLIPTextProjModel(clip_embeddings_dim=32, time_embed_dim=32, cross_attention_dim=32, text_layers=1, text_head_dim=16)
    )
    one_by_one = randomise(
        AutoregressivePrior(
            embedding_dim=32,
            num_embeddings=16,
            components=9,
            buckets=8,
            dot_buckets=4,
            width=32,
            layers=1,
            head_dim=16,
            text_layers=1,
            text_width=32,
        )
    )

    def text(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor([[3], [tokens - 2]])
        return torch.randn(2, 32, generator=g), torch.randn(2, tokens, 32, generator=g), torch.arange(tokens)[None] < lengths

    x, image = torch.randn(2, 32, generator=g), torch.randn(2, 3, 64, 64, generator=g)
    tokens, dot = torch.randint(0, 8, (2, 5), generator=g), torch.tensor([1, 3])
    (embeds, said, mask), (embeds_12, said_12, mask_12) = text(16), text(karlo.TOKENS)

    def drawn(network: nn.Module, condition: dict) -> list[Tensor]:
        return [network(image, 9, **condition).sample]

    def of_decoder() -> list[Tensor]:
        context, added = project(image_embeddings=x, prompt_embeds=embeds, text_encoder_hidden_states=said)
        seen = F.pad(mask, (4, 0), value=True)
        return drawn(ours["decoder"], {"encoder_hidden_states": context, "class_labels": added, "attention_mask": seen})

    def of_prior(network: nn.Module, *given: Tensor) -> list[Tensor]:
        return [network(x, 9, *given).predicted_image_embedding, predictor(network, *given)(x, torch.tensor(9))]

    added = torch.randn(2, 32, generator=g)
    of_stock = {"encoder_hidden_states": said_12, "class_labels": added, "attention_mask": mask_12}
    return {
        "DiffusionPrior": ([ours["prior"]], lambda: of_prior(ours["prior"], embeds, said, mask)),
        "AutoregressivePrior": ([one_by_one], lambda: [one_by_one(tokens, dot, embeds, said, mask)]),
        "Decoder and its text blocks": ([ours["decoder"], project], of_decoder),
        "PriorTransformer": ([stock["prior"]], lambda: of_prior(stock["prior"], embeds_12, said_12, mask_12)),
        "UNet2DConditionModel": ([stock["decoder"]], lambda: drawn(stock["decoder"], of_stock)),
    }


def check_networks(name: str, networks: list[nn.Module], answer: Callable[[], list[Tensor]]) -> None:
    results = []
    for backend in ("math", "xformers"):
        before = len(calls)
        for network in networks:
            network.zero_grad()
            install(network, backend)
        answers = answer()
        sum(a.square().mean() for a in answers).backward()
        gradients = [p.grad.clone() for n in networks for p in n.parameters() if p.grad is not None]
        assert gradients and (len(calls) > before) == (backend == "xformers")
        results.append([a.detach() for a in answers] + gradients)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    print(f"{name}: equal")


if __name__ == "__main__":
    main()
