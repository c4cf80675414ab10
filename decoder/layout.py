"""Layout of a scene: which objects a prompt names and where they are, and the draft image composed of them."""

# B batch, K slots, N text tokens, C width of the text encodings, D embedding dimension, W width, R side of an object's
# draft in pixels, S side of the composed image in pixels

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.blocks import Block, zero_module

POSE_SIZE = 0.91  # side of a centred single icon, which the draft head is trained on, as a fraction of the image's
BOX = 3  # x, y, size


@dataclass
class Layout:
    """The objects of each image, back to front, in up to K slots.

    `is_single` [B] is the logit of one object alone in the draft head's pose on white, whose draft is that of the image
    embedding. `present` [B, K] are the logits of a slot being used; `boxes` [B, K, 3] the centre x, y and the side of an
    object, in fractions of the image's side; `tokens` [B, K, N] the shares of the text tokens in naming it; `background`
    [B, 3] its colour in [-1, 1].
    """

    is_single: Tensor
    present: Tensor
    boxes: Tensor
    tokens: Tensor
    background: Tensor

    def embeddings(self, guess: Tensor) -> Tensor:
        """Unit image embeddings [B, K, D] of the objects, from those predicted for the tokens [B, N, D]."""
        return F.normalize(self.tokens.to(guess.dtype) @ F.normalize(guess, dim=-1), dim=-1)


class LayoutPredictor(nn.Module):
    """Transformer over learned queries, one for each slot and one for the image, and CLIP's text encodings.

    In the manner of DETR's object queries (arXiv 2005.12872, section 3.2), without matching: the slots have the order of the
    layers. It reads CLIP's encodings, which are frozen, and not the decoder's text layers, which change in its training.
    """

    def __init__(self, text_dim: int, slots: int = 5, width: int = 192, layers: int = 3, head_dim: int = 64):
        super().__init__()
        self.slots = slots
        self.queries = nn.Parameter(torch.randn(slots + 1, width) * width**-0.5)
        self.proj_in = nn.Linear(text_dim, width)
        self.blocks = nn.ModuleList(Block(width, head_dim, 0.0) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.slot_out = zero_module(nn.Linear(width, 1 + BOX))
        self.image_out = zero_module(nn.Linear(width, 1 + 3))
        self.pointer = nn.Linear(width, width)

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Layout:
        """`text` [B, N, C]; `mask` [B, N] bool, False at padding."""
        count = self.slots + 1
        queries = self.queries.expand(len(text), -1, -1)
        x = torch.cat([queries, self.proj_in(text)], 1)  # [B, K + 1 + N, W]
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        attended = F.pad(mask, (count, 0), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, attended)
        x = self.norm_out(x)
        slots, image, tokens = x[:, : self.slots], x[:, self.slots], x[:, count:]
        scores = self.pointer(slots) @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5  # [B, K, N]
        present, boxes = self.slot_out(slots).split((1, BOX), -1)
        is_single, background = self.image_out(image).split((1, 3), -1)
        return Layout(
            is_single[:, 0],
            present[..., 0],
            0.5 + boxes,
            scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1),
            1 + background,
        )


def compose_drafts(drafts: Tensor, boxes: Tensor, present: Tensor, background: Tensor, size: int) -> Tensor:
    """Images [B, 3, S, S] of objects on a plain background, about in [-1, 1].

    A draft shows its object of side POSE_SIZE on white, so that on a background b it adds draft - 1 and takes away opacity
    times b - 1.

    Args:
        drafts: [B, K, 4, R, R], colour in [-1, 1] on white and opacity in [0, 1].
        boxes: [B, K, 3], as in `Layout`.
        present: [B, K] bool.
        background: [B, 3] in [-1, 1].
        size: S.
    """
    batch, slots = present.shape
    scale = POSE_SIZE / boxes[..., 2].clamp_min(0.05).float()  # image to draft coordinates
    shift = -(2 * boxes[..., :2].float() - 1) * scale[..., None]
    zero = torch.zeros_like(scale)
    rows = torch.stack([scale, zero, shift[..., 0], zero, scale, shift[..., 1]], -1).view(-1, 2, 3)
    grid = F.affine_grid(rows, [batch * slots, 4, size, size], align_corners=False).to(drafts.dtype)
    offset = torch.tensor([1.0, 1.0, 1.0, 0.0], device=drafts.device, dtype=drafts.dtype).view(4, 1, 1)
    layers = F.grid_sample((drafts - offset).flatten(0, 1), grid, align_corners=False, padding_mode="zeros")
    layers = layers.unflatten(0, (batch, slots)) * present[..., None, None, None]
    image = background[..., None, None].expand(-1, -1, size, size)
    for layer in layers.unbind(1):
        colour, opacity = layer.split((3, 1), 1)
        image = image + colour - opacity.clamp(0, 1) * (image - 1)
    return image
