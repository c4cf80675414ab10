"""The autoregressive prior (paper, section 2.2): a CLIP image embedding as a sequence of quantised principal components."""

# B batch, N text tokens, D embedding dimension, K principal components, V buckets of each, C width

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .blocks import AttentionFunction, Block, Checkpointed, set_attention, zero_module
from .storage import Int8Storage


class AutoregressivePrior(Checkpointed, Int8Storage, ModelMixin, PeftAdapterMixin):
    """A causal Transformer over [text encodings, text embedding, dot product, components 1 ... K - 1].

    The `components` first principal components of an embedding, by falling variance, are each quantised to `buckets`
    values over +-`reach` standard deviations and predicted one after the other. The dot product of image and text
    embedding, quantised to `dot_buckets` equally frequent values, comes before them: in sampling it is from the top
    half. With `text_layers` the text first passes through a separate encoder, `text_width` wide.

    `clip_mean`, `clip_components`, `clip_std` and `clip_dots` are set by `fit` and saved with the weights. `clip_fingerprint`
    identifies the CLIP that it was trained for.
    """

    # diffusers' offloading would copy the lists that the blocks append to
    _skip_keys = ["past"]  # type: ignore[assignment]  # ModelMixin declares None

    clip_mean: Tensor  # [1, D]
    clip_components: Tensor  # [K, D]
    clip_std: Tensor  # [1, K]
    clip_dots: Tensor  # [dot_buckets - 1]

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
        self,
        embedding_dim: int = 384,
        num_embeddings: int = 32,
        components: int = 128,
        buckets: int = 256,
        dot_buckets: int = 64,
        reach: float = 4.0,
        width: int = 384,
        layers: int = 5,
        head_dim: int = 64,
        text_width: int = 384,
        text_layers: int = 0,
        dropout: float = 0.0,
        normalize: bool = True,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        if not 1 <= components <= embedding_dim:
            raise ValueError(f"components must be from 1 to embedding_dim ({embedding_dim}), got {components}")
        if buckets < 2 or dot_buckets < 2:
            raise ValueError(f"buckets and dot_buckets must be at least 2, got {buckets} and {dot_buckets}")
        inner = text_width if text_layers else width
        self.encoder_hidden_states_proj = nn.Linear(embedding_dim, inner)
        self.text_blocks = nn.ModuleList(Block(text_width, head_dim, dropout) for _ in range(text_layers))
        self.text_out = nn.Linear(text_width, width) if text_layers else nn.Identity()
        self.embedding_proj = nn.Linear(embedding_dim, width)
        self.dot_embedding = nn.Embedding(dot_buckets, width)
        self.bucket_embedding = nn.Embedding(buckets, width)
        self.positional_embedding = nn.Parameter(torch.randn(1, num_embeddings + 1 + components, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, head_dim, dropout) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.head = zero_module(nn.Linear(width, buckets))
        self.register_buffer("clip_mean", torch.zeros(1, embedding_dim))
        self.register_buffer("clip_std", torch.ones(1, components))
        self.register_buffer("clip_components", torch.eye(components, embedding_dim))
        self.register_buffer("clip_dots", torch.linspace(-1, 1, dot_buckets + 1)[1:-1].clone())
        for embedding in (self.dot_embedding, self.bucket_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def set_attn_processor(self, function: AttentionFunction) -> None:
        """Use `function` for every attention of the network."""
        set_attention(self, function)

    # -- embeddings and tokens

    @torch.no_grad()
    def fit(self, image_embeds: Tensor, text_embeds: Tensor) -> None:
        """Set principal components, their spread and the quantiles of the dot product from examples [n, D] and [n, D].

        Raises ValueError for fewer examples than components.
        """
        count = self.config["components"]
        if len(image_embeds) <= count:
            raise ValueError(f"{len(image_embeds)} embeddings are too few to find {count} principal components in")
        mean = image_embeds.mean(0, keepdim=True)
        directions = torch.linalg.svd((image_embeds - mean).double(), full_matrices=False).Vh[:count].to(mean)
        self.clip_mean.copy_(mean)
        self.clip_components.copy_(directions)
        self.clip_std.copy_(((image_embeds - mean) @ directions.T).std(0, keepdim=True).clamp_min(1e-6))
        dots = F.cosine_similarity(image_embeds, text_embeds)
        shares = torch.linspace(0, 1, self.config["dot_buckets"] + 1, dtype=dots.dtype, device=dots.device)[1:-1]
        self.clip_dots.copy_(torch.quantile(dots, shares))

    def quantise(self, embeddings: Tensor) -> Tensor:
        """CLIP image embeddings [B, D] -> tokens [B, K] int64 in [0, V)."""
        scores = (embeddings - self.clip_mean) @ self.clip_components.T / self.clip_std  # [B, K], unit variance
        buckets = self.config["buckets"]
        return ((scores / self.config["reach"] + 1) / 2 * buckets).floor().long().clamp(0, buckets - 1)

    def dequantise(self, tokens: Tensor) -> Tensor:
        """Tokens [B, K] -> embeddings [B, D] at the middle of their buckets, unit vectors when `normalize` is set."""
        scores = ((tokens + 0.5) / self.config["buckets"] * 2 - 1) * self.config["reach"] * self.clip_std
        embeddings = scores @ self.clip_components.to(scores.dtype) + self.clip_mean
        return F.normalize(embeddings, dim=-1) if self.config["normalize"] else embeddings

    def dot_tokens(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """The quantised dot product [B] int64 of unit vectors along embeddings [B, D] and [B, D]."""
        return torch.bucketize(F.cosine_similarity(image_embeds, text_embeds), self.clip_dots)

    # -- the network

    def forward(
        self,
        tokens: Tensor,
        dot: Tensor,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, n + 1, V] of components 1 ... n + 1, from the first n `tokens` [B, n], n below K.

        `dot` [B] int64; `proj_embedding` [B, D], the text embedding; `encoder_hidden_states` [B, N, D]; `attention_mask`
        [B, N] bool, True at a token. Padding at the end of every text may be left out of both.
        """
        prefix = self._prefix(dot, proj_embedding, encoder_hidden_states, attention_mask)  # [B, N + 2, C]
        x = torch.cat([prefix, self._embed_components(tokens)], 1)
        return self._logits(x, attention_mask, last=tokens.shape[1] + 1)

    def _prefix(self, dot: Tensor, text: Tensor, encodings: Tensor, mask: Tensor | None) -> Tensor:
        tokens, limit = encodings.shape[1], self.config["num_embeddings"]
        if tokens > limit:
            raise ValueError(f"encoder_hidden_states may have {limit} tokens, got {tokens}")
        x = self.encoder_hidden_states_proj(encodings)
        text_mask = None if mask is None else mask.bool()[:, None, None, :]  # [B, 1, 1, N]
        for block in self.text_blocks:
            x = self.run(block, x, text_mask)
        text = self.embedding_proj(F.normalize(text, dim=-1) * math.sqrt(text.shape[-1]))
        prefix = torch.cat([self.text_out(x), text[:, None], self.dot_embedding(dot)[:, None]], 1)
        positions = self.positional_embedding.to(prefix.dtype)
        return prefix + torch.cat([positions[:, :tokens], positions[:, limit : limit + 2]], 1)

    def _embed_components(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Embeddings [B, n, C] of components [B, n] from number `first` on, with their positions."""
        start = self.config["num_embeddings"] + 2 + first
        x = self.bucket_embedding(tokens)
        return x + self.positional_embedding[:, start : start + tokens.shape[1]].to(x.dtype)

    def _logits(
        self, x: Tensor, mask: Tensor | None, last: int, start: int = 0, past: list[list[Tensor]] | None = None
    ) -> Tensor:
        """Logits at the `last` positions of `x` [B, S, C], which begins at `start`; `past` has the blocks' keys and values."""
        size = x.shape[1]
        causal = torch.ones(size, start + size, dtype=torch.bool, device=x.device).tril(start)[None, None]
        if mask is not None:
            causal = causal & F.pad(mask.bool(), (0, start + size - mask.shape[1]), value=True)[:, None, None, :]
        for number, block in enumerate(self.blocks):
            x = self.run(block, x, causal) if past is None else block(x, causal, past=past[number])
        return self.head(self.norm_out(x[:, -last:]))

    # -- sampling

    @torch.no_grad()
    def draw(  # noqa: PLR0913 - a public call
        self,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        cached: bool = True,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
        on_token: Callable[[int, Tensor], Tensor] = lambda number, tokens: tokens,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Sample CLIP image embeddings [B, D], one principal component after the other.

        Under `guidance` other than 1 the conditions are [2B, ...], those without text first, and the logits are
        unconditional + guidance (conditional - unconditional). A list of generators has one for each embedding.
        With `cached` a KV cache saves computing earlier tokens again. `on_token` may replace the tokens [B, n] sampled so
        far; once `stopped()`, the remaining components have their mean.
        """
        guided = guidance != 1
        rows = len(proj_embedding) // (2 if guided else 1)
        components, buckets, dot_buckets = (self.config[name] for name in ("components", "buckets", "dot_buckets"))
        device = proj_embedding.device
        chance = _uniform((rows, components + 1), generator).to(device)
        half = dot_buckets // 2  # equally frequent buckets: the upper ones are the top half of the distribution
        dot = half + (chance[:, 0] * (dot_buckets - half)).long()
        dot = torch.cat([dot] * 2) if guided else dot
        prefix = self._prefix(dot, proj_embedding, encoder_hidden_states, attention_mask)
        past: list[list[Tensor]] | None = [[] for _ in self.blocks] if cached else None
        x, start = prefix, 0
        tokens = torch.empty(rows, 0, dtype=torch.long, device=device)
        for number in progress(range(components)):
            if stopped():
                break
            both = torch.cat([tokens] * 2) if guided else tokens
            if number and cached:
                start += x.shape[1]
                x = self._embed_components(both[:, -1:], number - 1)
            elif number:
                x = torch.cat([prefix, self._embed_components(both)], 1)
            logits = self._logits(x, attention_mask, 1, start, past)[:, 0].float()  # [B or 2B, V]
            if guided:
                unconditional, conditional = logits.chunk(2)
                logits = unconditional + guidance * (conditional - unconditional)
            share = logits.softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(share, chance[:, number + 1, None] * share[:, -1:]).clamp(max=buckets - 1)
            tokens = on_token(number, torch.cat([tokens, drawn], 1))
        middle = torch.full((rows, components - tokens.shape[1]), buckets // 2, device=device)
        return self.dequantise(torch.cat([tokens, middle], 1))


def _uniform(shape: tuple[int, int], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Uniform numbers in [0, 1), fp32; with a list of generators, each row from one of them."""
    if isinstance(generator, list):
        return torch.cat([_uniform((1, shape[1]), g) for g in generator])
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(shape, generator=generator, device=device).cpu()
