"""CLIP conditioning of the decoder: four extra context tokens, and an addition to the time embedding (paper, section 2.1)."""

# B batch, N text tokens, M context tokens, D embedding dimension, K context width, T time-embedding width

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from prior.blocks import AttentionFunction, Block, Checkpointed, set_attention, zero_module
from prior.storage import Int8Storage

from .draft import DraftHead
from .layout import Layout, LayoutPredictor, compose_drafts


class UnCLIPTextProjModel(Checkpointed, Int8Storage, ModelMixin):
    """Projects CLIP embeddings and text encodings to the decoder's conditioning.

    Parameters have the names of diffusers' class of this name, so that Karlo checkpoints load. `embedding_scale`
    multiplies the CLIP embeddings first: for unit vectors of D dimensions it should be sqrt(D), so that entries are of order
    one. `text_layers` above 0 adds a Transformer, `cross_attention_dim` wide, between CLIP's token encodings
    and the context: GLIDE's text encoder, which DALL·E 2 has too (paper, section 2.1). CLIP's encodings contain the objects
    but hardly their positions, so that without these layers a decoder cannot distinguish "a cat left of a dog" from its
    reverse. They are the identity at initialisation.
    With `text_images` an image embedding of what each text token names is predicted, a unit vector in CLIP's space, and
    projected to extra context tokens as the image embedding is. One image embedding cannot represent which object is where;
    these can, for several objects.
    `styles` are the names of drawing styles; an embedding of the requested one is added to the time embedding, zero at
    initialisation. `draft` holds the settings of a `DraftHead` (`size`, `width`, `layers`, `opacity`), whose images are
    further input channels of the decoder (`Decoder.draft_channels`). `layout` holds those of a `LayoutPredictor` (`slots`,
    `width`, `layers`): the draft of a prompt with several objects, or one elsewhere than in the head's pose, is composed of
    the objects' drafts. It needs `draft` with `opacity` and `text_images`.
    `clip_fingerprint` identifies the CLIP that the decoder was trained with.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913 - a key of the configuration each
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
        draft: dict[str, Any] | None = None,
        layout: dict[str, int] | None = None,
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
            # with a hidden layer, because it has to store the appearance of every name
            layers = nn.Linear(dim + cross_attention_dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            self.text_to_image = nn.Sequential(*layers)
            self.text_image_places = zero_module(nn.Linear(cross_attention_dim, cross_attention_dim, bias=False))
        self.style_embedding = zero_module(nn.Embedding(len(styles) + 1, time_embed_dim)) if styles else None
        self.draft_head = None if draft is None else DraftHead(dim, styles=len(styles), **draft)
        if layout is not None and not (draft and draft.get("opacity") and text_images):
            raise ValueError("layout needs draft with opacity, and text_images")
        self.layout_predictor = None if layout is None else LayoutPredictor(dim, **layout)

    def set_attn_processor(self, function: AttentionFunction) -> None:
        """Use `function` for every attention of the text blocks."""
        set_attention(self, function)

    def forward(  # noqa: PLR0913 - diffusers' interface
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

        M is 4 + N, with `text_images` 4 + N + 4N (`expand_to_context`).

        Args:
            image_embeddings: [B, D], also under guidance: the learned "no image" embedding is prepended here.
            prompt_embeds: text embeddings [B, D]; under guidance [2B, D], the unconditional half first, as the next two.
            text_encoder_hidden_states: text encodings [B, N, D].
            text_mask: [B, N] bool, False at padding, which the text layers do not attend to (None: no padding).
            do_classifier_free_guidance: whether the texts have an unconditional half.
            style: int64 [B], indices into `styles`, their count where no style is named (None: in no row). The unconditional
                half never has one.
            return_guess: also return what `guess` predicts, None without `text_images`.
        """
        if do_classifier_free_guidance:
            image_embeddings, style = self._prepend_unconditional(image_embeddings, style)
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
        context, guess = [extra, text], None  # each [B, tokens, K]
        if self.text_image_places is not None:
            guess = self.guess(text_encoder_hidden_states, text)  # [B, N, D]
            scaled = F.normalize(guess, dim=-1) * self.embedding_scale
            images = self._extra(scaled) + self.text_image_places(text)[..., None, :]  # [B, N, 4, K]
            context.append(images.flatten(1, 2))
        hidden = torch.cat(context, 1)
        return (hidden, added, guess) if return_guess else (hidden, added)

    def draft_image(
        self,
        image_embeddings: Tensor,
        style: Tensor | None = None,
        do_classifier_free_guidance: bool = False,
        text_encoder_hidden_states: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor | None:
        """The draft of image embeddings [B, D] and texts, under guidance [2B, ...] as in `forward`; None without a draft head.

        It is [B, 3, R, R]; with `layout` [B, 3, 2R, 2R], and composed of the named objects where the text names another image
        than one object alone. The draft of the learned "no image" embedding, and under guidance of the unconditional half,
        is zero.

        Args:
            image_embeddings: [B, D], also under guidance.
            style: as in `forward`.
            do_classifier_free_guidance: prepend the unconditional half, [B, ...] zeros.
            text_encoder_hidden_states: [B, N, D], or [2B, N, D] under guidance (None: every image is of one object alone).
            text_mask: as in `forward`.
        """
        if self.draft_head is None:
            return None
        null = self.learned_classifier_free_guidance_embeddings.to(image_embeddings.dtype)
        known = (image_embeddings != null).any(1)[:, None, None, None]
        draft = self.draft_head(image_embeddings, style)[:, :3] * known
        if self.layout_predictor is not None:
            draft = F.interpolate(draft, scale_factor=2, mode="bilinear", align_corners=False)
            if text_encoder_hidden_states is not None:
                count = len(image_embeddings)
                mask = None if text_mask is None else text_mask[-count:]
                layout, guess = self.predict_layout(text_encoder_hidden_states[-count:], mask)
                scene = self.compose(layout.embeddings(guess), layout.boxes, layout.present > 0, layout.background, style)
                draft = torch.where((layout.is_single > 0)[:, None, None, None], draft, scene)
        return torch.cat([torch.zeros_like(draft), draft]) if do_classifier_free_guidance else draft

    def predict_layout(self, text_encoder_hidden_states: Tensor, text_mask: Tensor | None = None) -> tuple[Layout, Tensor]:
        """The layout that texts [B, N, D] describe, and the image embeddings [B, N, D] that `guess` predicts.

        Raises ValueError without `layout`.
        """
        if self.layout_predictor is None:
            raise ValueError("predict_layout needs layout")
        text = self.read(text_encoder_hidden_states, text_mask)
        layout = self.layout_predictor(text_encoder_hidden_states, text_mask)
        return layout, self.guess(text_encoder_hidden_states, text)

    def compose(
        self, embeddings: Tensor, boxes: Tensor, present: Tensor, background: Tensor, style: Tensor | None = None
    ) -> Tensor:
        """The draft [B, 3, 2R, 2R] of objects with image embeddings [B, K, D]; the rest as `compose_drafts` takes it.

        Raises ValueError without `draft`.
        """
        if self.draft_head is None:
            raise ValueError("compose needs draft")
        slots = embeddings.shape[1]
        styles = None if style is None else style.repeat_interleave(slots)
        drafts = self.draft_head(embeddings.flatten(0, 1), styles).unflatten(0, (-1, slots))
        return compose_drafts(drafts, boxes, present, background.to(drafts.dtype), 2 * self.draft_head.size)

    def _prepend_unconditional(self, image_embeddings: Tensor, style: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Image embeddings [2B, D] and styles [2B], the unconditional half first."""
        null = self.learned_classifier_free_guidance_embeddings.to(image_embeddings.dtype).expand_as(image_embeddings)
        if style is not None:
            style = torch.cat([self._unnamed(image_embeddings), style])
        return torch.cat([null, image_embeddings]), style

    def _unnamed(self, like: Tensor) -> Tensor:
        """The index that stands for no named style, for each row of `like`."""
        return torch.full((len(like),), len(self.config["styles"]), device=like.device)

    def read(self, text_encoder_hidden_states: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Context tokens [B, N, K] from text encodings [B, N, D], through the text layers."""
        text = self.encoder_hidden_states_proj(text_encoder_hidden_states)
        mask = None if text_mask is None else text_mask[:, None, None]  # [B, 1, 1, N]
        for block in self.text_blocks:
            text = self.run(block, text, mask)
        return self.text_encoder_hidden_states_norm(text)

    def guess(self, text_encoder_hidden_states: Tensor, text: Tensor) -> Tensor:
        """Image embeddings [B, N, D], not normalised, of what each token names.

        Raises ValueError without `text_images`.
        """
        if self.text_to_image is None:
            raise ValueError("guess needs text_images")
        return self.text_to_image(torch.cat([text_encoder_hidden_states, text], -1))

    def _extra(self, embeddings: Tensor) -> Tensor:
        """The extra context tokens [..., 4, K] of CLIP embeddings [..., D]."""
        extra = self.clip_extra_context_tokens_proj(embeddings)  # [..., K * 4], tokens innermost
        return extra.unflatten(-1, (-1, self.clip_extra_context_tokens)).transpose(-1, -2)


def expand_to_context(project: nn.Module, text: Tensor, extra: bool | int) -> Tensor:
    """Values of the text tokens [B, N] as values of all context tokens [B, M] of `project`; `extra` for those of the image.

    `project` is a `UnCLIPTextProjModel`, this module's or diffusers'.
    """
    count = project.clip_extra_context_tokens
    if not isinstance(count, int):
        raise TypeError(f"clip_extra_context_tokens must be a number, got {type(count).__name__}")
    context = F.pad(text, (count, 0), value=extra)
    if getattr(project, "text_to_image", None) is None:
        return context
    return torch.cat([context, text.repeat_interleave(count, 1)], 1)
