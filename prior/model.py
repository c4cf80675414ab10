"""The diffusion prior (paper, section 2.2): text to a CLIP image embedding, called as diffusers' `PriorTransformer`."""

# B batch, N text tokens, D embedding dimension, C width, S = N + 4 tokens in all

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch import Tensor, nn

from .blocks import AttentionFunction, Block, Checkpointed, set_attention, zero_module
from .storage import Int8Storage


class DiffusionPrior(Checkpointed, Int8Storage, ModelMixin, PeftAdapterMixin):
    """A causal Transformer over [text encodings, text embedding, timestep, noised image embedding, query].

    Predicts the un-noised image embedding (x0) at the query token. Diffusion runs on whitened embeddings: `clip_mean`
    and `clip_std` are saved with the weights, and `post_process_latents` maps back to unit vectors of CLIP's space.
    `styles` are the names of drawing styles; an embedding of the requested one is added to the text embedding's token, zero
    at initialisation. `clip_fingerprint` identifies the CLIP that it was trained for.
    """

    clip_mean: Tensor  # [1, D]
    clip_std: Tensor  # [1, D]

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
        self,
        embedding_dim: int = 384,
        num_embeddings: int = 32,
        width: int = 384,
        layers: int = 5,
        head_dim: int = 64,
        dropout: float = 0.0,
        normalize: bool = True,
        styles: Sequence[str] = (),
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        self.proj_in = nn.Linear(embedding_dim, width)
        self.embedding_proj = nn.Linear(embedding_dim, width)
        self.encoder_hidden_states_proj = nn.Linear(embedding_dim, width)
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.positional_embedding = nn.Parameter(torch.randn(1, num_embeddings + 4, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, head_dim, dropout) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.style_embedding = zero_module(nn.Embedding(len(styles) + 1, width)) if styles else None
        self.proj_to_clip_embeddings = nn.Linear(width, embedding_dim)
        self.register_buffer("clip_mean", torch.zeros(1, embedding_dim))
        self.register_buffer("clip_std", torch.ones(1, embedding_dim))
        nn.init.zeros_(self.proj_to_clip_embeddings.weight)

    def set_attn_processor(self, function: AttentionFunction) -> None:
        """Use `function` for every attention of the network."""
        set_attention(self, function)

    def forward(  # noqa: PLR0913 - diffusers' interface
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | int,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
        style: Tensor | None = None,
    ) -> PriorTransformerOutput | tuple[Tensor]:
        """Predict whitened image embeddings (x0) [B, D].

        Args:
            hidden_states: the noised whitened image embeddings [B, D].
            timestep: one for all rows, or one each [B].
            proj_embedding: the text embeddings [B, D].
            encoder_hidden_states: the text encodings [B, N, D].
            attention_mask: [B, N] bool, True at a token. Padding at the end of every text may be left out of this and of the
                encodings.
            return_dict: return a `PriorTransformerOutput` rather than a tuple.
            style: int64 [B], indices into `styles`, or their count where no style is named (None: in no row).
        """
        tokens, limit = encoder_hidden_states.shape[1], self.config["num_embeddings"]
        if tokens > limit:
            raise ValueError(f"encoder_hidden_states may have {limit} tokens, got {tokens}")
        text = self.embed_text(proj_embedding, encoder_hidden_states, style)
        x = torch.cat([text, self.embed_step(hidden_states, timestep)], 1)  # [B, S, C]
        mask = torch.ones(tokens + 4, tokens + 4, dtype=torch.bool, device=x.device).tril()[None, None]  # [1, 1, S, S]
        if attention_mask is not None:
            mask = mask & F.pad(attention_mask.bool(), (0, 4), value=True)[:, None, None, :]  # [B, 1, S, S]
        for block in self.blocks:
            x = self.run(block, x, mask)
        predicted = self.project_out(x[:, -1])  # [B, D]
        return PriorTransformerOutput(predicted_image_embedding=predicted) if return_dict else (predicted,)

    def embed_text(self, proj_embedding: Tensor, encoder_hidden_states: Tensor, style: Tensor | None = None) -> Tensor:
        """The first N + 1 tokens [B, N + 1, C], the same at every step."""
        scale = math.sqrt(proj_embedding.shape[-1])  # so that a unit vector's entries are of order one
        text = self.embedding_proj(proj_embedding * scale)
        if self.style_embedding is not None:
            unnamed = torch.full((len(text),), len(self.config["styles"]), device=text.device)
            text = text + self.style_embedding(unnamed if style is None else style)
        text = text[:, None]
        tokens = torch.cat([self.encoder_hidden_states_proj(encoder_hidden_states), text], 1)
        positions = self.positional_embedding.to(tokens.dtype)
        return tokens + torch.cat([positions[:, : tokens.shape[1] - 1], positions[:, -4:-3]], 1)

    def embed_step(self, hidden_states: Tensor, timestep: Tensor | float | int) -> Tensor:
        """The last three tokens [B, 3, C]: timestep, noised embedding and query."""
        batch = len(hidden_states)
        timesteps = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)
        time = get_timestep_embedding(timesteps, self.config["width"], flip_sin_to_cos=True, downscale_freq_shift=0)
        time, query = self.time_embedding(time.to(self.dtype)), self.prd_embedding[0].expand(batch, -1)
        tokens = torch.stack([time, self.proj_in(hidden_states), query], 1)
        return tokens + self.positional_embedding[:, -3:].to(tokens.dtype)

    def project_out(self, query: Tensor) -> Tensor:
        """The predicted embedding [B, D] from the last layer's query token [B, C]."""
        return self.proj_to_clip_embeddings(self.norm_out(query))

    def whiten(self, embeddings: Tensor) -> Tensor:
        """CLIP image embeddings [B, D] as the diffusion uses them: zero mean and unit variance in every dimension."""
        return (embeddings - self.clip_mean) / self.clip_std

    def post_process_latents(self, latents: Tensor) -> Tensor:
        """Whitened embeddings [B, D] back in CLIP's space, as unit vectors when `normalize` is set."""
        embeddings = latents * self.clip_std + self.clip_mean
        return F.normalize(embeddings, dim=-1) if self.config["normalize"] else embeddings
