"""Training the draft head: from CLIP image embeddings, true and sampled, to low-resolution images of single icons."""

# N icons, B batch, D embedding dimension, R side of a draft in pixels

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ... import networks
from ...data.icon_packages import STYLES
from ...data.single_icons import SingleIcons
from ...runtime.config import ConfigError, construct
from .base import Objective, grid
from .conditioned import check_shares, gained
from .frozen_clip import frozen_clip
from .icon_bank import TOGETHER, IconBank

NOISES = 16_384  # rows of noise that examples pick from by their index
SHOWN = 16


class DraftObjective(Objective):
    """Mean squared error between the draft of an icon's image embedding and the icon itself, in one pose.

    A share `sampled` of the embeddings are what `prior` (a training run's or a pipeline's) samples for captions of the icon,
    so that the head learns to correct the prior; `samples` of them are made for each icon, once. Others are CLIP's own.
    `embedding_noise` blurs either by noise of up to that share of its length. The style is not named in `drop_style` of the
    examples. All else of `text_proj` stays as `init_from` has it.
    """

    shardable = False
    optional_init = ("text_proj",)

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        prior: str | None = None,
        sampled: float = 0.5,
        samples: int = 4,
        embedding_noise: float = 0.3,
        drop_style: float = 0.1,
    ):
        super().__init__()
        check_shares(sampled=sampled, drop_style=drop_style)
        if samples < 1 or embedding_noise < 0:
            raise ConfigError(
                f"objective.samples must be at least 1 and embedding_noise at least 0, got {samples} and {embedding_noise}"
            )
        self.examples = construct(SingleIcons, data, "data", split="train", seed=seed)
        self.icons, self.path = self.examples.icons, str(data["path"])
        self.frozen = frozen_clip(clip, None)
        project = networks.decoder(model, self.frozen.dim, self.frozen.fingerprint)["text_proj"]
        if project.draft_head is None or list(project.config.styles) != list(STYLES):
            raise ConfigError(f"the stage draft needs model.text_proj with a draft and styles: [{', '.join(STYLES)}]")
        project.requires_grad_(False)
        project.draft_head.requires_grad_(True)
        self.trained = nn.ModuleDict({"text_proj": project})
        self.icon_bank = IconBank(self.icons, Path(self.path), self.frozen, prior, samples, seed)
        self.seed, self.sampled = seed, sampled if prior else 0.0
        self.embedding_noise, self.drop_style = embedding_noise, drop_style
        self.images: Tensor | None = None
        self.noise: Tensor | None = None

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "draft_head.mean" not in state:  # a run with `init_from` is not prepared otherwise
            self.prepare()
        return state | gained(self.trained[name], state)

    @torch.no_grad()
    def prepare(self, device: torch.device | str = "cpu", progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Mean and standard deviation of the icons' embeddings, which the head standardises by."""
        self._fill(device, progress)
        head, embeds = self.trained["text_proj"].draft_head, self.icon_bank.embeds()
        head.mean.copy_(embeds.mean(0))
        head.std.copy_(embeds.std(0).clamp_min(1e-4))
        self.images = None  # what was filled here belongs on the device that the run will have

    def _fill(self, device: torch.device | str, progress: Callable[[Iterable], Iterable] = iter) -> None:
        """What every step looks up, on `device`: images [N, 3, R, R] in [-1, 1] and noise."""
        self.frozen.to(device)
        self.icon_bank.embeds(progress)
        if self.images is not None:
            return
        factor = self.icons.sprites.shape[1] // self.trained["text_proj"].draft_head.size
        starts = range(0, len(self.icons), TOGETHER)
        rows = [range(n, min(n + TOGETHER, len(self.icons))) for n in starts]
        self.images = torch.cat([F.avg_pool2d(self.icons.in_pose(r), factor) * 2 - 1 for r in rows]).to(device)
        noise = torch.randn(NOISES, self.frozen.dim, generator=torch.Generator().manual_seed(self.seed))
        self.noise = noise.to(device) / self.frozen.dim**0.5

    def to_tensors(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        random, rows = batch["random"], batch["row"]
        self._fill(rows.device)
        from_prior = random[:, 0] < self.sampled
        noise = self.noise[(batch["index"] * 2_654_435_761 % NOISES).to(rows.device, non_blocking=True)]
        embeds = self._embeds(rows, random[:, 1], from_prior)
        looked_up = {"embeds": embeds, "noise": noise, "image": self.images[rows], "from_prior": from_prior}
        return {"random": random, "style": batch["style"]} | looked_up

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        random, embeds, from_prior = batch["random"], batch["embeds"], batch["from_prior"]
        if self.embedding_noise:
            embeds = F.normalize(embeds + self.embedding_noise * random[:, 2, None] * batch["noise"], dim=-1)
        unnamed = len(STYLES)
        style = torch.where(random[:, 3] < self.drop_style, unnamed, batch["style"])
        drafts = self.trained["text_proj"].draft_image(embeds, style).float()
        losses = (drafts - batch["image"]).square().mean((1, 2, 3))  # [B]
        shown = {}
        for name, chosen in (("true", ~from_prior), ("sampled", from_prior)):
            shown[name] = (losses.detach() * chosen).sum() / chosen.sum().clamp_min(1)
        return losses.mean(), shown

    def _embeds(self, rows: Tensor, random: Tensor, from_prior: Tensor) -> Tensor:
        """Embeddings [B, D] of icons: CLIP's, or one of the sampled ones where `from_prior` [B], which `random` [B] picks."""
        embeds = self.icon_bank.embeds()[rows]
        if self.icon_bank.prior is None:
            return embeds
        return torch.where(from_prior[:, None], self.icon_bank.sampled(rows, random), embeds)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean squared error over icons trained on, from CLIP's embeddings and from sampled ones, and over unseen icons."""
        device = self.trained["text_proj"].draft_head.mean.device
        self._fill(device)
        seen = self._rows(self.examples, 1024)
        held_out = SingleIcons(self.path, "validation", self.seed, all_concepts=self.examples.all_concepts)
        found = {"true": self._error(seen, False), "held_out": self._error(self._rows(held_out, 256), False)}
        return found | ({"sampled": self._error(seen, True)} if self.icon_bank.prior else {})

    def _rows(self, examples: SingleIcons, count: int) -> Tensor:
        rows = [examples[n]["row"] for n in range(count)]
        return torch.tensor(rows).to(self.images.device)

    def _drafts(self, rows: Tensor, from_prior: bool) -> Tensor:
        chosen = torch.full((len(rows),), from_prior, device=rows.device)
        embeds = self._embeds(rows, torch.zeros(len(rows), device=rows.device), chosen)
        return self.trained["text_proj"].draft_image(embeds, self.examples.styles.to(rows.device)[rows]).float()

    def _error(self, rows: Tensor, from_prior: bool) -> float:
        return (self._drafts(rows, from_prior) - self.images[rows]).square().mean().item()

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Icons trained on: real, drafts from CLIP's embeddings and from sampled ones."""
        self._fill(self.trained["text_proj"].draft_head.mean.device)
        rows = self._rows(self.examples, SHOWN)
        shown = [self.images[rows], self._drafts(rows, False)]
        shown += [self._drafts(rows, True)] if self.icon_bank.prior else []
        return grid(torch.cat(shown) / 2 + 0.5, SHOWN, 2)

    def components(self) -> dict[str, Any]:
        return {"text_proj": self.trained["text_proj"]}
