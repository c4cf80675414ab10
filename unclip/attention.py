"""One attention function, and the choice of its kernel by device and size.

Layout everywhere: query [B, N, H, D], key and value [B, M, H, D], mask bool, broadcastable to [B, H, N, M], True = attend.
"""

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa", "math")
# Below this many key tokens two batched matrix products beat torch's CPU flash kernel, most of all backward.
MATH_TOKENS = 1024


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """softmax(query key^T / sqrt(D)) value -> [B, N, H, D].

    `backend`: "sdpa" is torch's scaled dot product attention, "math" two batched products; "auto" takes "math" on a CPU
    up to 1024 key tokens and "sdpa" elsewhere.
    """
    if backend == "auto":
        backend = "math" if query.device.type == "cpu" and key.shape[1] <= MATH_TOKENS else "sdpa"
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, H, N, D]
    if backend == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    scores = (query * (1 / math.sqrt(query.shape[-1]))) @ key.transpose(-1, -2)  # [B, H, N, M]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def install(network: nn.Module, backend: str = "auto") -> nn.Module:
    """Make a network of this package attend through `attention` with `backend`; others keep their own processors.

    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention {backend!r}; choose from {', '.join(BACKENDS)}")
    if hasattr(network, "set_attn_processor") and type(network).__module__.split(".")[0] in ("prior", "decoder"):

        def chosen(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            return attention(query, key, value, mask, backend)

        network.set_attn_processor(chosen)
        logger.info("%s: attention %s", type(network).__name__, backend)
    return network
