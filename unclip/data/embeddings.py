"""CLIP embeddings of captioned images, computed once by `unclip embed` and read in training."""

# N text tokens, D embedding dimension, E width of the token encodings

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..io.checkpoints import check_safetensors
from ..runtime.config import ConfigError

MANIFEST, EMPTY = "embeddings.json", "empty.safetensors"


def data_fingerprint(names: list[str], captions: list[str]) -> str:
    """A hash of image names and captions, in this order."""
    digest = hashlib.sha256()
    for line in (*names, *captions):
        digest.update(line.encode() + b"\0")
    return digest.hexdigest()[:16]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class EmbeddingCache:
    """The folder that `unclip embed` writes: shards of `rows` images each, in the order in which they are read.

    A shard holds `image_embeds` [n, D], `text_embeds` [n, D], `encodings` [all tokens, E] with `ends` [n] after each
    caption's last, and `readable` [n]. The fields of the manifest are attributes: `fingerprint` and `dim` of the CLIP,
    `tokens` N, `data` the fingerprint of names and captions, `size` in pixels of what the CLIP saw, `count`, `rows`, `dtype`.
    Raises ConfigError for a folder without embeddings or with missing shards, and ValueError for a damaged file, naming it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not (self.folder / MANIFEST).is_file():
            raise ConfigError(f"{folder} holds no embeddings: {MANIFEST} is missing; `unclip embed` writes it")
        try:
            manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.fingerprint, self.data, self.dtype = manifest["fingerprint"], manifest["data"], manifest["dtype"]
            self.dim, self.tokens, self.size = manifest["dim"], manifest["tokens"], manifest["size"]
            self.count, self.rows = manifest["count"], manifest["rows"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.folder / MANIFEST} is damaged; `unclip embed --force` writes it again") from None
        shards = -(-self.count // self.rows)
        there = sum((self.folder / shard_name(n)).is_file() for n in range(shards))
        if there < shards:
            raise ConfigError(f"{folder} is not complete: {there} of {shards} shards; the same `unclip embed` goes on with it")
        for number in range(shards):
            check_safetensors(self.folder / shard_name(number))
        self._open: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def check(self, names: list[str], captions: list[str], size: int) -> None:
        """Raises ConfigError where the cache was made of other images or captions, or at another size."""
        if self.data != data_fingerprint(names, captions):
            raise ConfigError(
                f"{self.folder} was made of other images or captions than data.path has; run `unclip embed` again"
            )
        if self.size != size:
            raise ConfigError(f"{self.folder} was made of images of {self.size} px, but data.size is {size}")

    def readable(self, row: int) -> bool:
        """Whether the image of a row could be opened when the cache was made."""
        return bool(self._shard(row // self.rows)[2][row % self.rows])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """`image_embeds` [D], `text_embeds` [D], `encodings` [N, E] and `mask` [N] bool of a row, fp32."""
        shard, ends, _ = self._shard(row // self.rows)
        n = row % self.rows
        start, end = int(ends[n - 1]) if n else 0, int(ends[n])
        packed = shard.get_slice("encodings")[start:end].float()
        encodings = packed.new_zeros(self.tokens, packed.shape[1])
        encodings[: end - start] = packed
        embeds = {name: shard.get_slice(name)[n : n + 1][0].float() for name in ("image_embeds", "text_embeds")}
        return embeds | {"encodings": encodings, "mask": torch.arange(self.tokens) < end - start}

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """Text embedding [1, D], encodings [1, N, E] and mask [1, N] of the empty text."""
        kept = load_file(self.folder / EMPTY)
        return kept["text_embeds"].float(), kept["encodings"].float(), kept["mask"].bool()

    def _shard(self, number: int) -> tuple[Any, Tensor, Tensor]:
        if number not in self._open:
            file = safe_open(self.folder / shard_name(number), "pt")
            self._open[number] = (file, file.get_tensor("ends"), file.get_tensor("readable"))
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}  # a data worker opens its own files
