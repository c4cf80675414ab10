"""How the decoder hears of CLIP: four extra context tokens and an addition to the time embedding (paper, section 2.1)."""

# B batch, N text tokens, M context tokens, D embedding dimension, K context width, T time-embedding width

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from prior.blocks import AttentionFunction, Block, Checkpointed, set_attention
from prior.storage import Int8Storage

from .draft import DraftHead


class UnCLIPTextProjModel(Checkpointed, Int8Storage, ModelMixin, ConfigMixin):
    """Projects the CLIP embeddings and the text encodings to what the decoder is conditioned on.

    Parameters carry the names of diffusers' class of this name, so that Karlo checkpoints load. `embedding_scale`
    multiplies the CLIP embeddings on entry: unit vectors of D dimensions want sqrt(D), or they arrive as almost nothing.
    `text_layers` above 0 is a Transformer of the decoder's own, `cross_attention_dim` wide, between CLIP's token encodings
    and the context: GLIDE's text encoder, which DALL·E 2 kept (paper, section 2.1). CLIP's encodings say what is spoken of
    and hardly where it is, so that without these layers a decoder cannot tell "a cat left of a dog" from its reverse. They
    start as the identity.
    With `text_images` every text token also speaks as an image embedding would: what it names is guessed as a unit vector in
    CLIP's space and becomes extra context tokens of its own, through the projection that the image embedding takes. One
    image embedding cannot say what stands where; these can, for each of several things, in a language that a decoder knows.
    `styles` are the names of drawing styles; the one that is asked for is added to the time embedding (zero at the start).
    `draft` holds the settings of a `DraftHead` (`size`, `width`, `layers`), whose images the decoder takes as further input
    channels (`Decoder.draft_channels`).
    `clip_fingerprint` names the CLIP that the decoder was trained with.
    """

    @register_to_config
    def __init__(
        self,
        *,
        clip_extra_context_tokens: int = 4,
        clip_embeddings_dim: int = 768,
        time_embed_dim: int,
        cross_attention_dim: int,
        embedding_scale: float = 1.0,
        text_layers: int = 0,
        text_head_dim: int = 64,
        text_images: bool = False,
        styles: Sequence[str] = (),
        draft: dict[str, int] | None = None,
        dropout: float = 0.0,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        dim, tokens = clip_embeddings_dim, clip_extra_context_tokens
        self.clip_extra_context_tokens = tokens
        self.embedding_scale = embedding_scale
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(dim))
        self.embedding_proj = nn.Linear(dim, time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(dim, time_embed_dim)
        self.clip_extra_context_tokens_proj = nn.Linear(dim, tokens * cross_attention_dim)
        self.encoder_hidden_states_proj = nn.Linear(dim, cross_attention_dim)
        self.text_blocks = nn.ModuleList(Block(cross_attention_dim, text_head_dim, dropout) for _ in range(text_layers))
        self.text_encoder_hidden_states_norm = nn.LayerNorm(cross_attention_dim)
        self.text_to_image = self.text_image_places = None
        if text_images:
            # a hidden layer, because it has the look of every name to keep
            layers = nn.Linear(dim + cross_attention_dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            self.text_to_image = nn.Sequential(*layers)
            self.text_image_places = nn.Linear(cross_attention_dim, cross_attention_dim, bias=False)
            nn.init.zeros_(self.text_image_places.weight)
        self.style_embedding = nn.Embedding(len(styles) + 1, time_embed_dim) if styles else None
        if styles:
            nn.init.zeros_(self.style_embedding.weight)
        self.draft_head = None if draft is None else DraftHead(dim, styles=len(styles), **draft)

    def set_attn_processor(self, function: AttentionFunction) -> None:
        """Use `function` for every attention of the text blocks."""
        set_attention(self, function)

    def forward(
        self,
        *,
        image_embeddings: Tensor,
        prompt_embeds: Tensor,
        text_encoder_hidden_states: Tensor,
        text_mask: Tensor | None = None,
        do_classifier_free_guidance: bool = False,
        style: Tensor | None = None,
        return_guess: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]:
        """-> context tokens [B, M, K] and the addition to the time embedding [B, T].

        M is 4 + N, with `text_images` 4 + N + 4N (`of_context`). With `return_guess` what `guess` says comes third, None
        without `text_images`.

        `image_embeddings` [B, D], `prompt_embeds` [B, D], `text_encoder_hidden_states` [B, N, D], `text_mask` [B, N] bool:
        True for what is no padding, which alone the text layers look at (None: all). Under guidance the
        texts are [2B, ...], unconditional first, and the image embeddings still [B, D]: the learned "no image"
        embedding is put before them here. `style` int64 [B] has numbers into `styles`, their count for "not named" (None: for
        all), which it always is in the unconditional half.
        """
        if do_classifier_free_guidance:
            image_embeddings, style = self._with_unconditional(image_embeddings, style)
        if len(image_embeddings) != len(prompt_embeds):
            raise ValueError(f"{len(image_embeddings)} image embeddings for {len(prompt_embeds)} prompt embeddings")
        image_embeddings = image_embeddings * self.embedding_scale
        prompt_embeds = prompt_embeds * self.embedding_scale
        added = self.clip_image_embeddings_project_to_time_embeddings(image_embeddings)
        added = added + self.embedding_proj(prompt_embeds)  # [B, T]
        if self.style_embedding is not None:
            added = added + self.style_embedding(self._unnamed(image_embeddings) if style is None else style)
        extra = self._extra(image_embeddings)
        text = self.read(text_encoder_hidden_states, text_mask)  # [B, N, K]
        context, guess = [extra, text], None
        if self.text_to_image is not None:
            guess = self.guess(text_encoder_hidden_states, text)  # [B, N, D]
            meant = F.normalize(guess, dim=-1)
            images = self._extra(meant * self.embedding_scale) + self.text_image_places(text)[..., None, :]  # [B, N, 4, K]
            context.append(images.flatten(1, 2))
        answer = torch.cat(context, 1), added
        return (*answer, guess) if return_guess else answer

    def draft_image(
        self, image_embeddings: Tensor, style: Tensor | None = None, do_classifier_free_guidance: bool = False
    ) -> Tensor | None:
        """The decoder's draft [B, 3, R, R] of image embeddings [B, D], under guidance [2B, ...] as in `forward`; None without
        a draft head.

        The learned "no image" embedding has no draft: zeros.
        """
        if self.draft_head is None:
            return None
        if do_classifier_free_guidance:
            image_embeddings, style = self._with_unconditional(image_embeddings, style)
        null = self.learned_classifier_free_guidance_embeddings.to(image_embeddings.dtype)
        known = (image_embeddings != null).any(1)[:, None, None, None]
        draft = self.draft_head(image_embeddings, style)
        return torch.where(known, draft, torch.zeros_like(draft))

    def _with_unconditional(self, image_embeddings: Tensor, style: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Image embeddings [2B, D] and styles [2B] with those of the unconditional half first."""
        null = self.learned_classifier_free_guidance_embeddings.to(image_embeddings.dtype).expand_as(image_embeddings)
        if style is not None:
            style = torch.cat([self._unnamed(image_embeddings), style])
        return torch.cat([null, image_embeddings]), style

    def _unnamed(self, like: Tensor) -> Tensor:
        """The number of "no style named" for each row of `like`."""
        return torch.full((len(like),), len(self.config.styles), device=like.device)

    def read(self, text_encoder_hidden_states: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """What the text layers make of the text encodings, as context tokens [B, N, K]."""
        text = self.encoder_hidden_states_proj(text_encoder_hidden_states)
        seen = None if text_mask is None else text_mask[:, None, None]  # [B, 1, 1, N]
        for block in self.text_blocks:
            text = self.run(block, text, seen)
        return self.text_encoder_hidden_states_norm(text)

    def guess(self, text_encoder_hidden_states: Tensor, text: Tensor) -> Tensor:
        """The image embedding, of any length, of what each token names [B, N, D], where there are `text_images`."""
        return self.text_to_image(torch.cat([text_encoder_hidden_states, text], -1))

    def _extra(self, embeddings: Tensor) -> Tensor:
        """The extra context tokens [..., 4, K] of CLIP embeddings [..., D]."""
        extra = self.clip_extra_context_tokens_proj(embeddings)  # [..., K * 4], tokens innermost
        return extra.unflatten(-1, (-1, self.clip_extra_context_tokens)).transpose(-1, -2)


def of_context(project: nn.Module, text: Tensor, extra: bool | int) -> Tensor:
    """A value for each text token [B, N] as one for each context token [B, M] of `project`; `extra` for the image's own.

    `project` is a `UnCLIPTextProjModel`, this module's or diffusers'.
    """
    count = project.clip_extra_context_tokens
    context = F.pad(text, (count, 0), value=extra)
    if getattr(project, "text_to_image", None) is None:
        return context
    return torch.cat([context, text.repeat_interleave(count, 1)], 1)
