"""One attention function, the choice of its kernel, and the processors that call it in diffusers' networks.

Layout everywhere: query [B, N, H, D], key and value [B, M, H, D]. A mask is broadcastable to [B, H, N, M]: bool (True =
attend) or a float that is added to the scores.
"""

import importlib.util
import logging
import math
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as StockAttention
from torch import Tensor, nn

from prior.blocks import Attention, AttentionFunction, KeyValueCache

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "xformers", "sdpa", "math")
# Up to this many key tokens two batched matrix products are faster than torch's CPU flash kernel backward; forward only in
# 16 bits, with heads as wide as this and at least as many queries.
MATH_TOKENS, MATH_WIDTH, MATH_QUERIES = 1024, 64, 64
# Scores up to this, as powers of two, are summed without their maximum, for as many heads at once as fit into the cache.
LARGEST_POWER, CACHED_SCORES = 32.0, 2**21
Operators = tuple[Any, Any]  # xformers' classes of a forward and a backward kernel
# The backends that "auto" cannot use on this machine, with the reason: tried once, not at every layer.
_refused: dict[str, str] = {}
_logged: set[str] = set()
NetworkT = TypeVar("NetworkT", bound=nn.Module)


class _AttentionNetwork(Protocol):
    """A network whose attention can be replaced."""

    attention_backend: str

    def set_attn_processor(self, processor: Any) -> None: ...


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, backend: str = "auto", op: Operators | None = None
) -> Tensor:
    """softmax(query key^T / sqrt(D) + mask) value -> [B, N, H, D].

    `backend`: "xformers" is its memory-efficient attention (`op` names its forward and backward kernels), "sdpa" torch's
    scaled dot product attention, "math" two batched products. "auto" takes xformers on CUDA where it is installed and
    has a kernel, "math" on a CPU up to 1024 key tokens where it is the faster one, else "sdpa"; instead of both, for a
    CPU's bfloat16 without gradients, products without softmax's maximum where the scores are small enough.
    """
    if backend == "auto":
        return _automatic(query, key, value, mask, op)
    if backend == "xformers":
        return _xformers(query, key, value, mask, op)
    return _sdpa(query, key, value, mask) if backend == "sdpa" else _products(query, key, value, mask)


def _automatic(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, op: Operators | None) -> Tensor:
    """`attention` with the kernel that is fastest here."""
    if query.device.type == "cuda" and "xformers" not in _refused:
        try:
            return _xformers(query, key, value, mask, op)
        except (ImportError, NotImplementedError, ValueError) as error:
            _refused["xformers"] = why_not("xformers") or str(error).splitlines()[0]
            logger.info("attention: sdpa, because xformers cannot be used here: %s", _refused["xformers"])
    products, compiling = _products_are_faster(query, key), torch.compiler.is_compiling()
    if _one_pass_is_faster(query, key, value) and not (compiling and products):  # the compiler fuses the products' softmax
        if compiling:
            return torch.ops.unclip.attention_bf16(query, key, value, mask)
        if (attended := _without_maximum(query, key, value, mask)) is not None:
            return attended
    return _products(query, key, value, mask) if products else _sdpa(query, key, value, mask)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, H, N, D]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, H, N, D]
    scores = (query * (1 / math.sqrt(query.shape[-1]))) @ key.transpose(-1, -2)  # [B, H, N, M]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def _one_pass_is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `_without_maximum` is faster than "sdpa", where it applies (benchmarks/attention.py)."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[1] < MATH_QUERIES:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))


def _without_maximum(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Attention in one pass over the scores instead of softmax's several: exponentials in place, without their maximum.

    A column of ones appended to the values sums them in the same product. None where a score could be too large for that (the
    norms of the longest query and key bound them), or where the mask depends on the query.
    """
    batch, queries, heads, width = query.shape
    keys, scale = key.shape[1], math.log2(math.e) / math.sqrt(width)
    longest = [torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32).amax().item() for t in (query, key)]
    if not longest[0] * longest[1] * scale <= LARGEST_POWER:
        return None
    values = F.pad(value, (0, 1), value=1.0)  # [B, M, H, D + 1]
    if mask is not None:
        if mask.ndim != 4 or mask.shape[-2] != 1 or (mask.dtype != torch.bool and mask.amax() > 0):
            return None
        weights = mask if mask.dtype == torch.bool else mask.exp()
        values = values * weights.expand(batch, -1, 1, keys).permute(0, 3, 1, 2)
    flat = [t.permute(0, 2, 1, 3).reshape(batch * heads, -1, t.shape[-1]) for t in (query * scale, key, values)]
    together = min(max(1, CACHED_SCORES // (queries * keys)), batch * heads)
    scores = query.new_empty(together, queries, keys)
    sums = query.new_empty(batch * heads, queries, values.shape[-1])
    for start in range(0, batch * heads, together):
        q, k, v = (t[start : start + together] for t in flat)
        torch.bmm(q, k.transpose(1, 2), out=scores[: len(q)])
        torch.bmm(scores[: len(q)].exp2_(), v, out=sums[start : start + together])
    sums = sums.unflatten(0, (batch, heads)).transpose(1, 2)  # [B, N, H, D + 1]
    return sums[..., :-1] / sums[..., -1:].clamp_min(torch.finfo(sums.dtype).tiny)


@torch.library.custom_op("unclip::attention_bf16", mutates_args=())
def _attention_op(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` as one operation of a compiled network: which kernel it takes depends on the values."""
    return attention(query, key, value, mask).contiguous()


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _products_are_faster(query: Tensor, key: Tensor) -> bool:
    """Whether "math" is faster than "sdpa" (benchmarks/attention.py)."""
    if query.device.type != "cpu" or key.shape[1] > MATH_TOKENS:
        return False
    if torch.is_grad_enabled() and query.requires_grad:
        return True
    return query.element_size() == 2 and query.shape[-1] >= MATH_WIDTH and query.shape[1] >= MATH_QUERIES


def _xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, op: Operators | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    query, key, value = (t.contiguous() for t in (query, key, value))
    bias = None if mask is None else aligned_bias(mask, query, key.shape[1])
    return memory_efficient_attention(query, key, value, attn_bias=bias, op=op)


def aligned_bias(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """A mask as the additive bias [B, H, N, M] that memory-efficient kernels take: every row starts on 16 bytes.

    The rows are slices of a wider allocation, because a row of, say, 81 keys would leave the next one unaligned.
    """
    batch, queries, heads = query.shape[:3]
    wide = -(-keys // 8) * 8
    bias = torch.zeros(batch, heads, queries, wide, dtype=query.dtype, device=query.device)[..., :keys]
    if mask.dtype == torch.bool:
        return bias.masked_fill_(~mask, torch.finfo(query.dtype).min)
    return bias.add_(mask.to(query.dtype))


def why_not(backend: str) -> str | None:
    """Why `backend` cannot run on this machine; None where it can. Raises ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention {backend!r}; choose from {', '.join(BACKENDS)}")
    if backend != "xformers":
        return None
    if not torch.cuda.is_available():
        return "it has no kernel for a CPU, and no CUDA device is available"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed; install it with: pip install 'unclip[cuda]'"
    from xformers import _cpp_lib  # the front end also loads without kernels, and then refuses every call

    if torch.version.hip is None and not _cpp_lib._built_with_cuda:
        return f"its kernels were not built for torch {torch.__version__}; install the xformers that was made for this torch"
    return None


def install(network: NetworkT, backend: str = "auto") -> NetworkT:
    """Make every attention layer of a network, this package's or diffusers', call `attention` with `backend`.

    Networks without attention are returned unchanged. Raises ValueError for an unknown backend and for one that cannot run
    here, with the reason.
    """
    reason = why_not(backend)
    if reason:
        raise ValueError(f"attention {backend!r} cannot be used: {reason}")
    if not hasattr(network, "set_attn_processor"):
        return network

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return attention(query, key, value, mask, backend)

    attending = cast(_AttentionNetwork, network)
    attending.set_attn_processor(Processor(function) if is_stock(network) else function)
    attending.attention_backend = backend
    message = describe(backend)
    if message not in _logged:  # once, not for every network of every pipeline
        _logged.add(message)
        logger.info("attention: %s", message)
    return network


def describe(backend: str) -> str:
    """What `backend` is on this machine; for "auto", its kernels, and why xformers' are not among them."""
    if backend != "auto":
        return backend
    refusal = _refused.get("xformers") or why_not("xformers")
    if torch.cuda.is_available():
        return f"sdpa, because {refusal}" if refusal else "xformers on CUDA"
    return f"math up to {MATH_TOKENS} key tokens, sdpa above; not xformers, because {refusal}"


def context_kv_cache(network: nn.Module, context: Tensor) -> KeyValueCache:
    """The keys and values of `context` [B, M, K] by attention layer, computed once for all steps of a denoising loop.

    Empty for a network with attention of another kind, or whose parameters are on the device only in its `forward`
    (offloading).
    """
    if hasattr(network, "_hf_hook") or hasattr(network, "_diffusers_hook"):
        return {}
    if not is_stock(network):
        own_layers = (m for m in network.modules() if isinstance(m, Attention) and m.context_kv is not None)
        return {layer: layer.project_context(context) for layer in own_layers}
    layers = [m for m in network.modules() if isinstance(m, StockAttention) and m.added_kv_proj_dim]
    if not all(isinstance(layer.processor, Processor) and not layer.norm_cross for layer in layers):
        return {}
    return {layer: (layer.add_k_proj(context), layer.add_v_proj(context)) for layer in layers}


def is_stock(network: nn.Module) -> bool:
    """Whether a network is diffusers' own class rather than this package's."""
    return type(network).__module__.split(".")[0] == "diffusers"


class Processor:
    """The processor of diffusers' `Attention` layers, with self, cross or added keys and values, that calls one function."""

    def __init__(self, function: AttentionFunction):
        self.function = function

    def __call__(
        self,
        attn: StockAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        kv_cache: KeyValueCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`hidden_states` [B, N, C] or [B, C, h, w]; `encoder_hidden_states` [B, M, K]; -> the input's shape.

        `kv_cache` has the context's keys and values by layer, as `context_kv_cache` returns.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        x = hidden_states.flatten(2).transpose(1, 2) if len(shape) > 3 or attn.added_kv_proj_dim else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = encoder_hidden_states
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attn.added_kv_proj_dim:
            context = hidden_states.flatten(2).transpose(1, 2) if context is None else context
            added = (attn.add_k_proj(context), attn.add_v_proj(context)) if kv_cache is None else kv_cache[attn]
            keys, values = [added[0]], [added[1]]
            if not attn.only_cross_attention:
                keys, values = [*keys, attn.to_k(x)], [*values, attn.to_v(x)]
        else:
            source = x if context is None else context
            keys, values = [attn.to_k(source)], [attn.to_v(source)]
        flat = (attn.to_q(x), torch.cat(keys, 1), torch.cat(values, 1))
        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in flat)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mask = None if attention_mask is None else _by_heads(attention_mask, len(x), attn.heads, key.shape[1])
        out = self.function(query, key, value, mask).flatten(2).to(query.dtype)  # [B, N, C]
        out = attn.to_out[1](attn.to_out[0](out))
        if out.ndim != len(shape):
            out = out.transpose(1, 2).reshape(shape)
        if attn.added_kv_proj_dim:
            return out + residual
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


def _by_heads(mask: Tensor, batch: int, heads: int, keys: int) -> Tensor:
    """An additive mask [B or B*H, 1 or N, m] as [B, 1 or H, 1 or N, M]; keys past `m` (the pixels) may be attended."""
    if mask.ndim == 2:
        mask = mask[:, None]
    mask = F.pad(mask, (0, keys - mask.shape[-1]))
    return mask.unflatten(0, (batch, -1)) if len(mask) == batch * heads else mask[:, None]
