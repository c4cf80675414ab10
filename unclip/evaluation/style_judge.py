"""A classifier of an icon's style by histograms of its colours and gradients.

The judge of `unclip.clip.judge` was trained on names: by captions that name a style it classifies 63% of real renders
correctly. Each style has its own colours, so a histogram of them is a better feature than a network's at a low resolution.
"""

# N images, F features, T styles

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..clip.judge import SHIPPED
from ..data.icon_packages import STYLES
from ..io.pixels import uint8_to_float
from .metrics import gradient_magnitude, object_mask

FILE = SHIPPED / "style.safetensors"
BINS = (16, 8)  # along each axis of the colour histograms
GRADIENT_BINS = (0.0, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)  # upper bounds
HIDDEN = 64
BATCH = 256


class StyleJudge(nn.Module):
    """Two layers over `features`, standardised by the mean and deviation of those it was trained on."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        width = sum(bins**3 for bins in BINS) + len(GRADIENT_BINS) + 1
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        layers = nn.Linear(width, HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, len(STYLES))
        self.layers = nn.Sequential(*layers)

    @classmethod
    def load(cls, path: Path = FILE) -> "StyleJudge":
        """The shipped one, or that of another file; in float32."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return judge.eval()

    def save(self, path: Path) -> None:
        """Write the weights in float16, which changes no prediction."""
        save_file({name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}, path)

    def forward(self, found: Tensor) -> Tensor:
        """Logits [N, T] of `features` [N, F]."""
        return self.layers((found - self.mean) / self.deviation)

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """Numbers in `STYLES` [N] of images uint8 [N, 3, 64, 64]."""
        return self(torch.cat([features(uint8_to_float(chunk)) for chunk in images.split(BATCH)])).argmax(1)


def features(images: Tensor) -> Tensor:
    """Histograms [N, F] of the object's pixels: colours (roots of their shares) and gradient magnitudes.

    `images` [N, 3, S, S] in [0, 1], on white.
    """
    object_ = object_mask(images)
    classes = torch.bucketize(gradient_magnitude(images), torch.tensor(GRADIENT_BINS))
    shares = [((classes == n) & object_).flatten(1).sum(1) for n in range(len(GRADIENT_BINS) + 1)]
    of_gradients = torch.stack(shares, 1) / object_.flatten(1).sum(1, keepdim=True).clamp_min(1)
    return torch.cat([*(_histogram(images, object_, bins) for bins in BINS), of_gradients], 1)


def _histogram(images: Tensor, object_: Tensor, bins: int) -> Tensor:
    """Roots of the shares of colours, each counted in the eight nearest of `bins`^3 by its distance: [N, bins^3]."""
    values = images.flatten(2) * (bins - 1)  # [N, 3, P]
    low = values.floor().clamp(max=bins - 2)
    above, low, inside = values - low, low.long(), object_.flatten(1).float()
    found = inside.new_zeros(len(images), bins**3)
    for corner in range(8):
        up = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])[:, None]
        weight = torch.where(up.bool(), above, 1 - above).prod(1) * inside
        red, green, blue = (low + up).unbind(1)
        found.scatter_add_(1, (red * bins + green) * bins + blue, weight)
    return (found / inside.sum(1, keepdim=True).clamp_min(1)).sqrt()


# ---------------------------------------------------------------------------------------------- training


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 3, S, S] in [0, 1] with the flaws of samples: some blurred or noised, all with a small colour shift."""
    found = []
    for chunk in images.split(BATCH):
        rows = (len(chunk), 1, 1, 1)
        if torch.rand(1, generator=generator) < 0.5:
            share = 0.5 + 0.5 * torch.rand(1, generator=generator).item()
            small = F.interpolate(chunk, scale_factor=share, mode="area", recompute_scale_factor=True)
            chunk = F.interpolate(small, chunk.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
        grain = 0.04 * torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) < 0.6)
        tint = 0.03 * (2 * torch.rand(len(chunk), 3, 1, 1, generator=generator) - 1) * object_mask(chunk)[:, None]
        found.append((chunk + grain * torch.randn(chunk.shape, generator=generator) + tint).clamp(0, 1))
    return torch.cat(found)


def train(images: Tensor, styles: Tensor, views: int = 4, updates: int = 1500, seed: int = 0) -> StyleJudge:
    """A classifier of real renders: as they are, and in `views` augmented versions of each.

    Args:
        images: uint8 [N, 3, S, S], on white.
        styles: numbers in `STYLES` [N].
    """
    generator = torch.Generator().manual_seed(seed)
    clean = uint8_to_float(images)
    found = torch.cat(
        [features(chunk) for n in range(views + 1) for chunk in (augmented(clean, generator) if n else clean).split(BATCH)]
    )
    wanted = styles.repeat(views + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = StyleJudge()
        judge.mean, judge.deviation = found.mean(0), found.std(0).clamp_min(2e-3)
        optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.1)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, updates)
        for _ in range(updates):
            rows = torch.randint(len(found), (BATCH,), generator=generator)
            loss = F.cross_entropy(judge(found[rows]), wanted[rows], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return judge.eval()
