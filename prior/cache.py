"""The prior's loop without its prefix: what the text tokens say to the others is the same at every step, and is kept.

The sequence is [text encodings, text embedding | timestep, noised image embedding, query] under a causal mask, so no token
left of the bar depends on a timestep or on noise. Each step then runs three tokens.
"""

# B rows of text, R rows of noise for each, N text tokens, D embedding dimension, C width, P tokens kept

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import PriorTransformer
from torch import Tensor, nn

from .blocks import sdpa
from .model import DiffusionPrior
from .packed import packed

# (tokens [B, N, C], mask [B, 1, N, M] bool, keys and values of earlier tokens, which the layer adds its own to) -> [B, N, C]
Layer = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


@dataclass
class Parts:
    """A prior taken apart: the tokens that never change, those of a step, its blocks as layers, and the query's reading."""

    embed_text: Callable[..., Tensor]
    embed_step: Callable[[Tensor, Tensor], Tensor]
    blocks: Sequence[nn.Module]
    layer: Callable[[nn.Module], Layer]
    answer: Callable[[Tensor], Tensor]


def predictor(
    prior: nn.Module,
    proj_embedding: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    repeats: int = 1,
    style: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (noised embeddings [B * R, D], timestep) that answers as `prior` does, with `repeats` R rows a text.

    `proj_embedding` [B, D], `encoder_hidden_states` [B, N, D], `attention_mask` [B, N] bool and `style` [B] are as the prior
    takes them; `style` is for priors that have some.
    On a CPU tokens that are padding in every row are left out: nothing may look at them, and to find them would make the
    host wait for a GPU. Equal to the prior's own answer but for rounding. A prior that is built otherwise, or whose
    parameters come and go with its `forward` (offloading), is called as it is.
    """
    parts = _parts(prior)
    if parts is None or hasattr(prior, "_hf_hook") or hasattr(prior, "_diffusers_hook"):
        given = (proj_embedding, encoder_hidden_states, attention_mask)
        text, encodings, mask = (v.repeat_interleave(repeats, 0) for v in given)
        named = {} if style is None else {"style": style.repeat_interleave(repeats, 0)}
        return lambda x, t: prior(x, t, text, encodings, mask, **named).predicted_image_embedding

    rows, device = len(proj_embedding), proj_embedding.device
    named = () if style is None else (style,)
    prefix = parts.embed_text(proj_embedding, encoder_hidden_states, *named)  # [B, P, C]
    keys = torch.cat([attention_mask.bool(), attention_mask.new_ones(rows, 1, dtype=torch.bool)], 1)  # [B, P]
    if device.type == "cpu":
        seen = keys.any(0)
        prefix, keys = prefix[:, seen], keys[:, seen]
    causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=device).tril()
    kept: list[list[Tensor]] = [[] for _ in parts.blocks]
    for block, past in zip(parts.blocks, kept, strict=True):
        prefix = parts.layer(block)(prefix, keys[:, None, None] & causal, past)
    kept = [[half.repeat_interleave(repeats, 0) for half in past] for past in kept]
    own = torch.ones(3, 3, dtype=torch.bool, device=device).tril().expand(rows * repeats, 1, 3, 3)
    mask = torch.cat([keys.repeat_interleave(repeats, 0)[:, None, None].expand(-1, 1, 3, -1), own], -1)  # [B * R, 1, 3, P + 3]

    layers = [parts.layer(packed(block, 3 * rows * repeats)) for block in parts.blocks]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        x = parts.embed_step(x, t)  # [B * R, 3, C]
        for layer, past in zip(layers, kept, strict=True):
            x = layer(x, mask, list(past))
        return parts.answer(x[:, -1])

    return predict


def _parts(prior: nn.Module) -> Parts | None:
    """None for a prior whose sequence is another one."""
    if isinstance(prior, DiffusionPrior):
        return Parts(prior.embed_text, prior.embed_step, prior.blocks, lambda block: block, prior.answer)
    if type(prior) is not PriorTransformer or prior.prd_embedding is None or prior.encoder_hidden_states_proj is None:
        return None
    if prior.positional_embedding.shape[1] != prior.config.num_embeddings + 4:
        return None
    norm_in = prior.norm_in or nn.Identity()
    positions = prior.positional_embedding

    def embed_text(proj_embedding: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        if prior.embedding_proj_norm is not None:
            proj_embedding = prior.embedding_proj_norm(proj_embedding)
        encodings = prior.encoder_hidden_states_proj(encoder_hidden_states)
        tokens = torch.cat([encodings, prior.embedding_proj(proj_embedding)[:, None]], 1)
        return norm_in(tokens + positions[:, :-3].to(tokens.dtype))

    def embed_step(x: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        time = prior.time_embedding(prior.time_proj(t).to(prior.dtype))
        tokens = torch.stack([time, prior.proj_in(x), prior.prd_embedding[0].to(time.dtype).expand(len(x), -1)], 1)
        return norm_in(tokens + positions[:, -3:].to(tokens.dtype))

    def answer(query: Tensor) -> Tensor:
        return prior.proj_to_clip_embeddings(prior.norm_out(query))

    return Parts(embed_text, embed_step, prior.transformer_blocks, _stock_layer, answer)


def _stock_layer(block: nn.Module) -> Layer:
    """One of diffusers' `BasicTransformerBlock`s as `PriorTransformer` has them, through the attention it was given."""
    attn = block.attn1
    function = getattr(attn.processor, "function", sdpa)

    def layer(x: Tensor, mask: Tensor, past: list[Tensor]) -> Tensor:
        normed = block.norm1(x)
        query, key, value = (p(normed).unflatten(-1, (attn.heads, -1)) for p in (attn.to_q, attn.to_k, attn.to_v))
        past[:] = [torch.cat(pair, 1) for pair in zip(past, (key, value), strict=True)] if past else [key, value]
        x = x + attn.to_out[0](function(query, *past, mask).flatten(2).to(x.dtype))
        return x + block.ff(block.norm3(x))

    return layer
