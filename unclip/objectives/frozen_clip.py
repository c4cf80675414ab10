"""The CLIP that prior and decoder are trained against."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import components_folder
from ..clip import CLIP


class FrozenCLIP(nn.Module):
    """The CLIP that a stage is trained against, without gradients."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.towers = nn.ModuleDict({"text": clip.text_encoder, "image": clip.image_encoder}).requires_grad_(False).eval()
        self.clip = clip
        self.dim = clip.text_encoder.config.embedding_dim
        self.fingerprint = clip.fingerprint

    @classmethod
    def load(cls, model: str) -> "FrozenCLIP":
        """The CLIP of a training run or of a pipeline, in fp32 and channels_last."""
        clip = CLIP.from_pretrained(components_folder(model), dtype=torch.float32)
        clip.image_encoder.to(memory_format=torch.channels_last)
        return cls(clip)

    def train(self, mode: bool = True) -> "FrozenCLIP":
        return super().train(False)

    @torch.no_grad()
    def text(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings [B, D], token encodings [B, N, D] and mask [B, N] bool."""
        tokens = self.clip.tokenize(captions).to(self.towers["text"].device)
        longest = int(tokens.attention_mask.sum(1).max())
        ids, mask = tokens.input_ids[:, :longest], tokens.attention_mask[:, :longest]
        output = self.towers["text"](ids, mask)
        encodings = F.pad(output.last_hidden_state, (0, 0, 0, tokens.input_ids.shape[1] - longest))
        return output.text_embeds.float(), encodings.float(), tokens.attention_mask.bool()

    @torch.no_grad()
    def image(self, pictures: Tensor) -> Tensor:
        """Image embeddings [B, D] of pictures [B, 3, H, W] in [-1, 1]."""
        size = self.towers["image"].config.image_size
        if pictures.shape[-1] != size:
            pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return self.towers["image"](pictures.contiguous(memory_format=torch.channels_last)).image_embeds.float()
