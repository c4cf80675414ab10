"""Text encoding: prompts to CLIP text embeddings and encodings."""

# B images, D embedding dimension, N text tokens

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clip.preprocessing import tokenize, truncated_parts
from ...networks import embedding_dim

if TYPE_CHECKING:
    from ..base import UnCLIPBase

logger = logging.getLogger(__name__)

Encoded = tuple[Tensor, Tensor, Tensor]  # embeddings [B, D], encodings [B, N, D], mask [B, N] bool


@dataclass
class TextCondition:
    """Outputs of CLIP's text tower for the prompts: `embeds` [B, D], `encodings` [B, N, D], `mask` [B, N] bool.

    The `empty_*` fields are those of guidance's unconditional half: the empty or the negative prompt. `style` [B] int64 has
    indices of drawing styles, their count for "not named", for checkpoints with styles.
    """

    embeds: Tensor
    encodings: Tensor
    mask: Tensor
    empty_embeds: Tensor
    empty_encodings: Tensor
    empty_mask: Tensor
    style: Tensor | None = None

    def inputs(self, is_guided: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, encodings and mask: [B, ...], under guidance [2B, ...] with the unconditional half first."""
        if not is_guided:
            return self.embeds, self.encodings, self.mask
        embeds = torch.cat([self.empty_embeds, self.embeds])
        encodings = torch.cat([self.empty_encodings, self.encodings])
        return embeds, encodings, torch.cat([self.empty_mask, self.mask])

    def repeated(self, times: int) -> "TextCondition":
        """Each prompt `times` times in a row."""
        return self._map(lambda field: field.repeat_interleave(times, 0))

    def __getitem__(self, rows: slice) -> "TextCondition":
        return self._map(lambda field: field[rows])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TextCondition":
        """`function` of every field."""
        changed = {name: function(value) for name, value in vars(self).items() if value is not None}
        return replace(self, **changed)

    def __len__(self) -> int:
        return len(self.embeds)


def count_prompts(pipe: "UnCLIPBase", prompt: Any, text_model_output: Any = None, text_attention_mask: Any = None) -> int:
    """The number of prompts. Raises ValueError, naming it, for an invalid one."""
    if text_model_output is not None and text_attention_mask is not None:
        return _count_encoded(pipe, text_model_output, text_attention_mask)
    if prompt is None:
        raise ValueError("give a prompt, or both text_model_output and text_attention_mask")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"prompt must be a str or a non-empty list of str, got {prompt!r}")
    for one in prompts:
        if not isinstance(one, str):
            raise ValueError(f"prompt must be a str or a list of str, got {one!r} ({type(one).__name__})")
        if not one.strip():
            raise ValueError(f"prompt is empty: {one!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in one):
            raise ValueError(f"prompt is no text in UTF-8: {one!r}")
    return len(prompts)


def _count_encoded(pipe: "UnCLIPBase", text_model_output: Any, text_attention_mask: Tensor) -> int:
    """The number of encoded texts. Raises ValueError, naming the shapes, for tensors that do not fit."""
    shapes = [list(t.shape) for t in (text_model_output[0], text_model_output[1], text_attention_mask)]
    dim = embedding_dim(pipe.text_encoder)
    rows, tokens = len(text_model_output[0]), text_attention_mask.shape[-1]
    if shapes[0] != [rows, dim] or len(shapes[1]) != 3 or shapes[1][:2] != [rows, tokens] or shapes[2] != [rows, tokens]:
        wanted = f"[B, {dim}] and [B, N, ...], and text_attention_mask [B, N]"
        raise ValueError(f"text_model_output must be {wanted}; got {', '.join(map(str, shapes))}")
    if tokens > pipe.tokenizer.model_max_length:
        raise ValueError(f"text_model_output has {tokens} tokens, of which this CLIP has {pipe.tokenizer.model_max_length}")
    return rows


def encode_texts(pipe: "UnCLIPBase", texts: list[str]) -> Encoded:
    """Text embeddings [B, D], encodings [B, N, D] and mask [B, N] bool; warns about parts that the tokenizer truncates."""
    tokens = tokenize(pipe.tokenizer, texts)
    for part in truncated_parts(pipe.tokenizer, texts, tokens.input_ids):
        logger.warning("the prompt is longer than %d tokens; cut off: %r", pipe.tokenizer.model_max_length, part)
    tokens = tokens.to(pipe._execution_device)
    with pipe._run_stage("text_encoder", "text_encoder"):
        output = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    return output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool()


def encoded_text(pipe: "UnCLIPBase", text_model_output: Any, text_attention_mask: Tensor | None) -> Encoded | None:
    """A call's `text_model_output` and `text_attention_mask` as `encode_texts` returns them; None without both."""
    if text_model_output is None or text_attention_mask is None:
        return None
    device = pipe._execution_device
    return text_model_output[0].to(device), text_model_output[1].to(device), text_attention_mask.to(device).bool()


def encode_prompt(
    pipe: "UnCLIPBase",
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None = None,
    num_images: int = 1,
    encoded: Encoded | None = None,
    count: int | None = None,
) -> TextCondition:
    """The text condition of the images, each prompt's `num_images` in a row; a single prompt is for all of `count`.

    `encoded` are texts instead of a prompt. Raises ValueError for numbers of prompts or negative prompts that do not fit.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt or []
    embeds, encodings, mask = encode_texts(pipe, prompts) if encoded is None else encoded
    rows = len(embeds) if count is None else count
    if len(embeds) not in (1, rows):
        raise ValueError(f"prompt must be a str, or a list of {rows} of them, got {prompt!r}")
    negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
    if len(negative) not in (1, rows) or not all(isinstance(n, str) for n in negative):
        raise ValueError(f"negative_prompt must be a str, or a list of {rows} of them, got {negative_prompt!r}")
    is_same = encoded is None and negative == prompts
    fields = [embeds, encodings, mask, *((embeds, encodings, mask) if is_same else encode_texts(pipe, negative))]
    longest = max(fields[2].shape[1], fields[5].shape[1])
    for n in (1, 4):  # `encoded` may be padded to another length
        fields[n] = F.pad(fields[n], (0, 0, 0, longest - fields[n].shape[1]))
        fields[n + 1] = F.pad(fields[n + 1], (0, longest - fields[n + 1].shape[1]))
    one_each = TextCondition(*(f.expand(rows, *f.shape[1:]) for f in fields))
    return one_each.repeated(num_images)
