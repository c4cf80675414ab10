"""CLIP: a text tower and an image tower that map sentences and images to unit vectors of one space."""

# B batch, N tokens, D embedding dimension

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from PIL import Image
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..io.checkpoints import load_components, resolve, save_components
from .preprocessing import ImagePreprocessor, preprocess, tokenize
from .stock import clip_image, clip_text
from .towers import Tower

PARTS = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")  # of a CLIP, by their names in a pipeline


class CLIP:
    """A text tower, its tokenizer, an image tower and its preprocessor as one encoder.

    Works with this package's towers and with transformers' CLIP models.
    """

    def __init__(
        self,
        text_encoder: Tower,
        tokenizer: PreTrainedTokenizerBase,
        image_encoder: Tower,
        feature_extractor: ImagePreprocessor,
    ):
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor

    @classmethod
    def from_pretrained(cls, model: str | Path = "emoji", **kwargs: Any) -> Self:
        """The CLIP of a pipeline: `"emoji"` (the shipped model), a folder, or a Hub id; or a CLIP of transformers."""
        folder = resolve(model)
        if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
            parts = clip_text(folder) | clip_image(folder)
            if "image_encoder" not in parts:
                raise ValueError(f"{folder} is no CLIP: it has a text tower only")
            return cls(**parts).to(**kwargs)

        return cls(**load_components(folder, PARTS, **kwargs))

    @property
    def components(self) -> dict[str, object]:
        """The four parts, by their names in a pipeline."""
        return {name: getattr(self, name) for name in PARTS}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the four parts as sub-folders of `folder`, in the layout of a pipeline."""
        save_components(Path(folder), self.components)

    @property
    def fingerprint(self) -> str:
        """Identifies this pair of towers: the fingerprint that training recorded in them, else a hash of their weights.

        Prior and decoder record it, because with another CLIP they sample noise. A recorded one survives a change of dtype.
        """
        recorded = getattr(self.text_encoder.config, "clip_fingerprint", None)
        return recorded or self._hash()

    def stamp(self) -> None:
        """Record a hash of the present weights in both towers' configurations.

        Raises TypeError for towers of transformers, whose configurations have no place for it.
        """
        found = self._hash()
        for tower in (self.text_encoder, self.image_encoder):
            if not isinstance(tower, ConfigMixin):
                raise TypeError(f"a {type(tower).__name__} cannot record a fingerprint")
            tower.register_to_config(clip_fingerprint=found)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for tower in (self.text_encoder, self.image_encoder):
            for name, tensor in sorted(tower.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move both towers, as `torch.nn.Module.to`."""
        self.text_encoder.to(*args, **kwargs)
        self.image_encoder.to(*args, **kwargs)
        return self

    def tokenize(self, texts: Sequence[str], padding: str | bool = "max_length") -> BatchEncoding:
        """`input_ids` and `attention_mask` [B, N] of the texts, truncated to the tokenizer's length.

        Emoji are replaced by their names.
        """
        return tokenize(self.tokenizer, texts, padding)

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit vectors [B, D] of the texts."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        wrong = next((t for t in texts if not isinstance(t, str)), None)
        if wrong is not None or not texts:
            raise ValueError(f"texts must be a non-empty list of str, got {wrong if texts else texts!r}")
        tokens = self.tokenize(texts, padding=True).to(self.text_encoder.device)
        output = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(output.text_embeds.float(), dim=-1)

    @torch.no_grad()
    def encode_image(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """Unit vectors [B, D] of PIL images or of a tensor [B, 3, H, W] in [0, 1].

        Transparent images are composited on white. Raises ValueError for a tensor of another shape or range.
        """
        return self.encode_pixels(self.preprocess(images))

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, 3, S, S] from `preprocess`."""
        pixels = pixels.to(self.image_encoder.device, self.image_encoder.dtype)
        return F.normalize(self.image_encoder(pixels).image_embeds.float(), dim=-1)

    def preprocess(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """The image tower's input [B, 3, S, S]: images resized with antialiasing and normalised."""
        return preprocess(self.feature_extractor, images)
