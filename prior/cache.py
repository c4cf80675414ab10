"""The diffusion prior with a KV cache for its text tokens, which are the same at every step.

The sequence is [text encodings, text embedding | timestep, noised image embedding, query] under a causal mask, so no token
left of the bar depends on a timestep or on noise. Each step then runs three tokens.
"""

# B rows of text, R rows of noise for each, N text tokens, D embedding dimension, C width, P tokens in the cache

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor, nn

from .blocks import AttentionFunction, sdpa
from .model import DiffusionPrior
from .packed import packed

# (tokens [B, N, C], mask [B, 1, N, M] bool, keys and values of earlier tokens, extended by those of `tokens`) -> [B, N, C]
Layer = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


@dataclass
class Parts:
    """The parts of a prior: embeddings of text and step, its blocks, a block as a `Layer`, and the output projection."""

    embed_text: Callable[..., Tensor]
    embed_step: Callable[[Tensor, Tensor], Tensor]
    blocks: nn.ModuleList
    layer: Callable[[nn.Module], Layer]
    project_out: Callable[[Tensor], Tensor]


def predictor(
    prior: nn.Module,
    proj_embedding: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    repeats: int = 1,
    style: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (noised embeddings [B * R, D], timestep) with the predictions of `prior`, R = `repeats` rows a text.

    `proj_embedding` [B, D], `encoder_hidden_states` [B, N, D], `attention_mask` [B, N] bool and `style` [B] are arguments of
    the prior; `style` is for priors with styles.
    On a CPU tokens that are padding in every row are left out; on a GPU finding them would synchronise with the host. Equal
    to the prior's prediction but for rounding. A prior with another sequence, or whose parameters are on the device only in
    its `forward` (offloading), is called without a cache.
    """
    parts = _parts(prior)
    if parts is None or hasattr(prior, "_hf_hook") or hasattr(prior, "_diffusers_hook"):
        given = (proj_embedding, encoder_hidden_states, attention_mask)
        text, encodings, mask = (v.repeat_interleave(repeats, 0) for v in given)
        options = {} if style is None else {"style": style.repeat_interleave(repeats, 0)}
        return lambda x, t: prior(x, t, text, encodings, mask, **options).predicted_image_embedding

    rows, device = len(proj_embedding), proj_embedding.device
    named = () if style is None else (style,)
    prefix = parts.embed_text(proj_embedding, encoder_hidden_states, *named)  # [B, P, C]
    keys = torch.cat([attention_mask.bool(), attention_mask.new_ones(rows, 1, dtype=torch.bool)], 1)  # [B, P]
    if device.type == "cpu":
        is_used = keys.any(0)
        prefix, keys = prefix[:, is_used], keys[:, is_used]
    causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=device).tril()
    kv_cache: list[list[Tensor]] = [[] for _ in parts.blocks]  # keys and values of each block
    for block, past in zip(parts.blocks, kv_cache, strict=True):
        prefix = parts.layer(block)(prefix, keys[:, None, None] & causal, past)
    kv_cache = [[tensor.repeat_interleave(repeats, 0) for tensor in past] for past in kv_cache]
    step_mask = torch.ones(3, 3, dtype=torch.bool, device=device).tril().expand(rows * repeats, 1, 3, 3)
    text_mask = keys.repeat_interleave(repeats, 0)[:, None, None].expand(-1, 1, 3, -1)
    mask = torch.cat([text_mask, step_mask], -1)  # [B * R, 1, 3, P + 3]

    layers = [parts.layer(packed(block, 3 * rows * repeats)) for block in parts.blocks]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        x = parts.embed_step(x, t)  # [B * R, 3, C]
        for layer, past in zip(layers, kv_cache, strict=True):
            x = layer(x, mask, list(past))
        return parts.project_out(x[:, -1])

    return predict


def _parts(prior: nn.Module) -> Parts | None:
    """None for a prior with another sequence."""
    if isinstance(prior, DiffusionPrior):
        return Parts(prior.embed_text, prior.embed_step, prior.blocks, lambda block: block, prior.project_out)
    if not isinstance(prior, PriorTransformer) or prior.prd_embedding is None or prior.encoder_hidden_states_proj is None:
        return None
    if prior.positional_embedding.shape[1] != prior.config["num_embeddings"] + 4:
        return None
    norm_in = prior.norm_in or nn.Identity()
    positions, query_embedding, project_encodings = (
        prior.positional_embedding,
        prior.prd_embedding,
        prior.encoder_hidden_states_proj,
    )

    def embed_text(proj_embedding: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        if prior.embedding_proj_norm is not None:
            proj_embedding = prior.embedding_proj_norm(proj_embedding)
        encodings = project_encodings(encoder_hidden_states)
        tokens = torch.cat([encodings, prior.embedding_proj(proj_embedding)[:, None]], 1)
        return norm_in(tokens + positions[:, :-3].to(tokens.dtype))

    def embed_step(x: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        time = prior.time_embedding(prior.time_proj(t).to(prior.dtype))
        tokens = torch.stack([time, prior.proj_in(x), query_embedding[0].to(time.dtype).expand(len(x), -1)], 1)
        return norm_in(tokens + positions[:, -3:].to(tokens.dtype))

    def project_out(query: Tensor) -> Tensor:
        return prior.proj_to_clip_embeddings(prior.norm_out(query))

    return Parts(embed_text, embed_step, prior.transformer_blocks, _stock_layer, project_out)


def _stock_layer(block: nn.Module) -> Layer:
    """A `BasicTransformerBlock` as in diffusers' `PriorTransformer`, with the attention function of its processor."""
    if not isinstance(block, BasicTransformerBlock):
        raise TypeError(f"expected a BasicTransformerBlock, got {type(block).__name__}")
    attn = block.attn1
    function: AttentionFunction = getattr(attn.processor, "function", sdpa)

    def layer(x: Tensor, mask: Tensor, past: list[Tensor]) -> Tensor:
        normed = block.norm1(x)
        query, key, value = (p(normed).unflatten(-1, (attn.heads, -1)) for p in (attn.to_q, attn.to_k, attn.to_v))
        past[:] = [torch.cat(pair, 1) for pair in zip(past, (key, value), strict=True)] if past else [key, value]
        x = x + attn.to_out[0](function(query, past[0], past[1], mask).flatten(2).to(x.dtype))
        return x + block.ff(block.norm3(x))

    return layer
