"""CLIP embeddings of single icons in one pose: CLIP's own, and those that a prior samples for their captions."""

# N icons, K sampled embeddings of an icon, B batch, D embedding dimension

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prior.cache import predictor

from ...data.icon_packages import STYLES
from ...data.scenes import IconSet, style_phrase
from ...diffusion.sampling import DenoisingOptions, denoise
from ...io.checkpoints import components_folder, load_components, resolve, save_tensors, write_beside
from ...runtime.config import ConfigError

PRIOR_STEPS, PRIOR_GUIDANCE = 10, 3.5
TOGETHER = 128  # icons that are embedded or sampled at once


class IconBank:
    """Embeddings of all icons, made once and kept beside the dataset under a name that says what they depend on.

    `prior` is a training run's or a pipeline's folder; without one there are no sampled embeddings. Of plain shapes, which
    have no folder, nothing is kept.
    """

    def __init__(self, icons: IconSet, path: Path, frozen: Any, prior: str | None, samples: int, seed: int):
        self.icons, self.path, self.frozen, self.samples, self.seed = icons, path, frozen, samples, seed
        self.prior = None if prior is None else components_folder(resolve(prior))
        if self.prior is not None:
            self._check_prior(self.prior)
        self._embeds: Tensor | None = None
        self._sampled: Tensor | None = None

    def _check_prior(self, prior: Path) -> None:
        """Raises ConfigError for a prior of another CLIP, and for one that is autoregressive."""
        config = json.loads((prior / "prior" / "config.json").read_text(encoding="utf-8"))
        if config["_class_name"] == "AutoregressivePrior":
            raise ConfigError(f"objective.prior {prior} is autoregressive: a diffusion prior is needed")
        made_for = config.get("clip_fingerprint")
        if made_for not in (None, self.frozen.fingerprint):
            raise ConfigError(
                f"objective.prior {prior} was trained for the CLIP {made_for}, but objective.clip is {self.frozen.fingerprint}"
            )

    def take(self, embeds: Tensor, sampled: Tensor | None = None) -> None:
        """Use tables that were made elsewhere: CLIP's embeddings [N, D], and `samples` sampled ones of each [N, K, D]."""
        self._embeds, self._sampled = embeds, sampled

    def embeds(self, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """CLIP's image embeddings [N, D], on the device of the frozen CLIP."""
        if self._embeds is None:
            self._embeds = self._cached("embeds", [], lambda: embed_icons(self.icons, self.frozen, progress))
        return self._on_device("_embeds")

    def sampled(self, rows: Tensor, random: Tensor, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Sampled embeddings [B, D] of the icons `rows` [B]; `random` [B] in [0, 1) picks one of each icon's."""
        if self._sampled is None:
            if self.prior is None:
                raise ValueError("there are no sampled embeddings without a prior")
            folder = self.prior
            files = sorted((folder / "prior").glob("*.safetensors"))
            self._sampled = self._cached("sampled", files, lambda: self._sample(folder, progress))
        return self._on_device("_sampled")[rows, (random * self.samples).long()]

    def _on_device(self, name: str) -> Tensor:
        moved = getattr(self, name).to(next(self.frozen.buffers()).device)
        setattr(self, name, moved)
        return moved

    def _sample(self, folder: Path, progress: Callable[[Iterable], Iterable]) -> Tensor:
        parts = load_components(folder, ("prior", "prior_scheduler"), dtype=torch.float32)
        prior = parts["prior"].eval().to(next(self.frozen.buffers()).device)
        return PriorSampler(self.frozen, prior, parts["prior_scheduler"], self.seed).sample(self.icons, self.samples, progress)

    def _cached(self, name: str, files: list[Path], make: Callable[[], Tensor]) -> Tensor:
        if not self.path.is_dir():
            return make()
        facts = [self.frozen.fingerprint, str(len(self.icons)), *([str(self.seed), str(self.samples)] if files else [])]
        digest = hashlib.sha256("|".join(facts).encode())
        for file in files:
            digest.update(file.read_bytes())
        path = self.path / f"icons-{name}-{digest.hexdigest()[:16]}.safetensors"
        if not path.is_file():
            made = make().cpu().contiguous()
            write_beside(path, lambda partial: save_tensors({name: made}, partial))
        return load_file(path)[name]


def load_icon_bank(objective: Any, data: dict[str, Any], prior: str | None, samples: int) -> IconBank:
    """The bank of an objective's icons; a method of the objectives that have one, which `unclip plan` overrides."""
    return IconBank(objective.examples.icons, Path(str(data["path"])), objective.frozen, prior, samples, objective.seed)


@torch.no_grad()
def embed_icons(icons: IconSet, frozen: Any, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """CLIP's image embeddings [N, D] of all icons in their one pose."""
    found, device = [], next(frozen.buffers()).device
    for start in progress(range(0, len(icons), TOGETHER)):
        images = icons.in_pose(range(start, min(start + TOGETHER, len(icons))))
        found.append(frozen.image(images.to(device) * 2 - 1))
    return torch.cat(found)


class PriorSampler:
    """Samples image embeddings for captions of icons from a diffusion prior, as a pipeline would."""

    def __init__(self, frozen: Any, prior: Any, scheduler: Any, seed: int):
        self.frozen, self.prior, self.scheduler, self.seed = frozen, prior, scheduler, seed

    @torch.no_grad()
    def sample(self, icons: IconSet, samples: int, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Embeddings [N, K, D]; an icon's captions are its name with its style, its plain name, and what else it is called."""
        found = torch.empty(len(icons), samples, self.frozen.dim)
        groups = [range(n, min(n + TOGETHER, len(icons))) for n in range(0, len(icons), TOGETHER)]
        for rows in progress(groups):
            for number in range(samples):
                captions = [_caption(icons, n, number) for n in rows]
                styles = torch.tensor([STYLES.index(icons.icons[n]["style"]) for n in rows])
                found[rows.start : rows.stop, number] = self._sample(captions, styles, rows.start * 101 + number)
        return found

    def _sample(self, captions: list[str], style: Tensor, seed: int) -> Tensor:
        text, encodings, mask = self.frozen.text(captions)
        empty = [e.expand(len(captions), *e.shape[1:]) for e in self.frozen.text([""])]
        text_embeds, both_encodings, both_masks = (torch.cat(p) for p in zip(empty, (text, encodings, mask), strict=True))
        styles = None
        if self.prior.config.get("styles"):
            styles = torch.cat([torch.full_like(style, len(STYLES)), style]).to(text.device)
        predict = predictor(self.prior, text_embeds, both_encodings, both_masks, style=styles)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + seed) % 2**63)
        start = torch.randn(text.shape, generator=generator).to(text)
        drawn = denoise(predict, start, self.scheduler, PRIOR_STEPS, DenoisingOptions(guidance=PRIOR_GUIDANCE))
        return self.prior.post_process_latents(drawn).cpu()


def _caption(icons: IconSet, row: int, number: int) -> str:
    """The caption for an icon's sample `number`: name with style, name, then its other captions with the style in turn."""
    captions, phrase = icons.captions(row), style_phrase(icons.icons[row]["style"])
    plain, styled, *others = captions
    if number < 2 or not others:
        return (styled, plain)[number % 2]
    return f"{others[number % len(others)]}, {phrase}"
