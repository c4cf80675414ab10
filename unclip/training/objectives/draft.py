"""Training the draft head: from CLIP image embeddings, true and sampled, to low-resolution images of single icons."""

# N icons, B batch, D embedding dimension, R side of a draft in pixels

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ... import networks
from ...data.icon_packages import STYLES
from ...data.single_icons import SingleIcons
from ...runtime.config import ConfigError, construct
from .base import Objective, grid, mean_where
from .conditioned import check_shares, new_weights
from .frozen_clip import frozen_clip
from .icon_bank import TOGETHER, load_icon_bank

NOISES = 16_384  # rows of noise, of which an example's index chooses one
SAMPLES = 16
USE_SAMPLED, WHICH_SAMPLE, EMBEDDING_NOISE, DROP_STYLE = range(4)  # the columns of `random` of `SingleIcons`


class DraftObjective(Objective):
    """Mean squared error between the draft of an icon's image embedding and the icon itself, in one pose.

    A share `sampled` of the embeddings are what `prior` (a training run's or a pipeline's) samples for captions of the icon,
    so that the head learns to correct the prior; `samples` of them are made for each icon, once. Others are CLIP's own.
    `embedding_noise` is the largest norm of the noise added to either. The style is dropped in `drop_style` of the examples.
    A share `from_text` are what `text_proj` predicts from the icon's name alone (`layout`), as for the objects of a scene.
    A head with `opacity` learns that of the icon too. The rest of `text_proj` stays as in `init_from`.
    """

    shardable = False
    optional_init = ("text_proj",)
    load_icon_bank = load_icon_bank

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
        from_text: float = 0.0,
    ):
        super().__init__()
        check_shares(sampled=sampled, drop_style=drop_style, from_text=from_text)
        if prior and sampled + from_text > 1:
            raise ConfigError(f"objective.sampled and from_text may add up to 1, got {sampled} and {from_text}")
        if samples < 1 or embedding_noise < 0:
            raise ConfigError(
                f"objective.samples must be at least 1 and embedding_noise at least 0, got {samples} and {embedding_noise}"
            )
        self.examples = self.load_examples(data, "train", seed)
        self.icons, self.path = self.examples.icons, str(data["path"])
        self.frozen = self.load_clip(clip, None)
        project: Any = networks.decoder(model, self.frozen.dim, self.frozen.fingerprint)["text_proj"]
        if project.draft_head is None or list(project.config.styles) != list(STYLES):
            raise ConfigError(f"the stage draft needs model.text_proj with a draft and styles: [{', '.join(STYLES)}]")
        if from_text and project.layout_predictor is None:
            raise ConfigError("objective.from_text needs model.text_proj.layout")
        project.requires_grad_(False)
        project.draft_head.requires_grad_(True)
        self.trained = nn.ModuleDict({"text_proj": project})
        self.seed, self.sampled = seed, sampled if prior else 0.0
        self.icon_bank = self.load_icon_bank(data, prior, samples)
        self.embedding_noise, self.drop_style, self.from_text = embedding_noise, drop_style, from_text
        self.images: Any = None  # a tensor, once it is filled
        self.noise: Any = None
        self.predicted: Any = None

    @property
    def text_proj(self) -> Any:
        """The network whose draft head is trained."""
        return self.trained["text_proj"]

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> SingleIcons:
        return construct(SingleIcons, data, "data", split=split, seed=seed)

    def load_clip(self, clip: str, embeddings: str | None) -> Any:
        return frozen_clip(clip, None)

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "draft_head.mean" not in state:  # the trainer does not call `prepare` with `init_from`
            self.prepare()
        return state | new_weights(self.trained[name], state)

    @torch.no_grad()
    def prepare(self, device: torch.device | str = "cpu", progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Mean and standard deviation of the icons' embeddings, which the head standardises by."""
        self._fill(device, progress)
        head, embeds = self.text_proj.draft_head, self.icon_bank.embeds()
        head.mean.copy_(embeds.mean(0))
        head.std.copy_(embeds.std(0).clamp_min(1e-4))
        self.images = None  # filled again on the device of the run

    def _fill(self, device: torch.device | str, progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Make the tables that every step reads, on `device`: images [N, 3, R, R] in [-1, 1] and noise."""
        self.frozen.to(device)
        self.icon_bank.embeds(progress)
        if self.images is not None:
            return
        head = self.text_proj.draft_head
        factor, opacity = self.icons.sprites.shape[1] // head.size, head.opacity_out is not None
        starts = range(0, len(self.icons), TOGETHER)
        rows = [range(n, min(n + TOGETHER, len(self.icons))) for n in starts]
        images = torch.cat([F.avg_pool2d(self.icons.in_pose(r, opacity=opacity), factor) for r in rows])
        images[:, :3] = images[:, :3] * 2 - 1
        self.images = images.to(device)
        noise = torch.randn(NOISES, self.frozen.dim, generator=torch.Generator().manual_seed(self.seed))
        self.noise = noise.to(device) / self.frozen.dim**0.5
        if self.from_text:
            self.predicted = torch.cat([self._predict(r) for r in progress(rows)])

    @torch.no_grad()
    def _predict(self, rows: range) -> Tensor:
        """The embeddings [B, D] that `text_proj` predicts for the only object of captions that name an icon."""
        _, encodings, mask = self.frozen.text([self.icons.captions(n)[0] for n in rows])
        layout, guess = self.text_proj.predict_layout(encodings, mask)
        return layout.embeddings(guess)[:, 0]

    def to_tensors(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        random, rows = batch["random"], batch["row"]
        self._fill(rows.device)
        from_prior = random[:, USE_SAMPLED] < self.sampled
        noise = self.noise[(batch["index"] * 2_654_435_761 % NOISES).to(rows.device, non_blocking=True)]
        embeds = self._embeds(rows, random[:, WHICH_SAMPLE], from_prior)
        from_text = ~from_prior & (random[:, USE_SAMPLED] < self.sampled + self.from_text)
        if self.predicted is not None:
            embeds = torch.where(from_text[:, None], self.predicted[rows], embeds)
        looked_up = {"embeds": embeds, "noise": noise, "image": self.images[rows]}
        looked_up |= {"from_prior": from_prior, "from_text": from_text}
        return {"random": random, "style": batch["style"]} | looked_up

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        random, embeds = batch["random"], batch["embeds"]
        if self.embedding_noise:
            embeds = F.normalize(embeds + self.embedding_noise * random[:, EMBEDDING_NOISE, None] * batch["noise"], dim=-1)
        style = torch.where(random[:, DROP_STYLE] < self.drop_style, len(STYLES), batch["style"])
        drafts = self.text_proj.draft_head(embeds, style).float()
        losses = (drafts - batch["image"]).square().mean((1, 2, 3))  # [B]
        from_prior, from_text = batch["from_prior"], batch["from_text"]
        sources = {"true": ~(from_prior | from_text), "sampled": from_prior}
        if self.from_text:
            sources["text"] = from_text
        return losses.mean(), {name: mean_where(losses.detach(), chosen) for name, chosen in sources.items()}

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        head = self.text_proj.draft_head
        rows, embeds = torch.zeros(size, dtype=torch.long), torch.zeros(size, self.frozen.dim)
        batch = {"random": torch.full((size, 4), 0.5), "style": rows, "embeds": embeds, "noise": embeds}
        channels = 3 if head.opacity_out is None else 4
        return batch | {
            "image": torch.zeros(size, channels, head.size, head.size),
            "from_prior": rows > 0,
            "from_text": rows > 0,
        }

    def _embeds(self, rows: Tensor, random: Tensor, from_prior: Tensor) -> Tensor:
        """Embeddings [B, D] of icons: CLIP's, or, where `from_prior` [B], the sampled one that `random` [B] chooses."""
        embeds = self.icon_bank.embeds()[rows]
        if self.icon_bank.prior is None:
            return embeds
        return torch.where(from_prior[:, None], self.icon_bank.sampled(rows, random), embeds)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean squared error over icons trained on, from CLIP's embeddings and from sampled ones, and over unseen icons."""
        device = self.text_proj.draft_head.mean.device
        self._fill(device)
        trained = self._rows(self.examples, 1024)
        held_out = SingleIcons(self.path, "validation", self.seed, all_concepts=self.examples.all_concepts)
        found = {"true": self._error(trained, False), "held_out": self._error(self._rows(held_out, 256), False)}
        return found | ({"sampled": self._error(trained, True)} if self.icon_bank.prior else {})

    def _rows(self, examples: SingleIcons, count: int) -> Tensor:
        rows = [examples[n]["row"] for n in range(count)]
        return torch.tensor(rows).to(self.images.device)

    def _drafts(self, rows: Tensor, from_prior: bool) -> Tensor:
        chosen = torch.full((len(rows),), from_prior, device=rows.device)
        embeds = self._embeds(rows, torch.zeros(len(rows), device=rows.device), chosen)
        return self.text_proj.draft_head(embeds, self.examples.styles.to(rows.device)[rows]).float()

    def _error(self, rows: Tensor, from_prior: bool) -> float:
        return (self._drafts(rows, from_prior) - self.images[rows])[:, :3].square().mean().item()

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Icons trained on: real, drafts from CLIP's embeddings and from sampled ones."""
        self._fill(self.text_proj.draft_head.mean.device)
        rows = self._rows(self.examples, SAMPLES)
        columns = [self.images[rows], self._drafts(rows, False)]
        columns += [self._drafts(rows, True)] if self.icon_bank.prior else []
        return grid(torch.cat(columns)[:, :3] / 2 + 0.5, SAMPLES, 2)

    def components(self) -> dict[str, Any]:
        return {"text_proj": self.trained["text_proj"]}
