"""Training the upsamplers (paper, section 2.3): crops, a corrupted low-resolution image, no text."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from upsamplers.degrade import corrupt, noise_labels
from upsamplers.model import resize

from ... import networks
from ...data.examples import Degraded, crop_examples, seeded_noise
from ...diffusion.predictions import predict_x0, target
from ...diffusion.sampling import denoise
from ...diffusion.schedules import ddim, move_schedule, schedule, uniform_timesteps
from ...io.pixels import normalize
from ...runtime.config import ConfigError
from .base import Objective, grid
from .random_columns import COLUMNS, CONDITION_NOISE, IMAGE_NOISE, NOISE_LEVEL, TIMESTEP

VALIDATION_EXAMPLES = 32
SCALE = 4


class UpsamplerObjective(Objective):
    """The sharp crop from a noised one and a corrupted low-resolution one.

    `loss` is "charbonnier", on the predicted x0, which keeps edges that a mean square would smear (arXiv
    1710.01992), or "mse", the paper's, on what `prediction_type` asks of the network. `edges` weighs a second Charbonnier
    term on the differences of neighbouring pixels. With `degrade` "blur" the low-resolution image is the crop's 4 x 4 mean,
    blurred by up to `blur` of its pixels and noised by up to `grain` of the range [-1, 1], as for the paper's first
    upsampler; with "bsr" it is degraded by `upsamplers.degrade.bsr`, as for its second.

    With `model.class_embed_type` "timestep" the network is conditioned on the noise level that `grain` sets (arXiv 2106.15282,
    section 4), with "bsr" too, which otherwise adds none. Weights that `init_from` holds of a network without this condition
    are carried over.
    """

    schedule: Any  # a scheduler of diffusers

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        blur: float = 0.6,
        grain: float = 0.05,
        edges: float = 1.0,
        degrade: str = "blur",
        loss: str = "charbonnier",
        prediction_type: str = "sample",
        beta_schedule: str = "squaredcos_cap_v2",
        sampling_steps: int = 2,
    ):
        super().__init__()
        for name, choice, known in (
            ("degrade", degrade, ("blur", "bsr")),
            ("loss", loss, ("charbonnier", "mse")),
            ("beta_schedule", beta_schedule, ("squaredcos_cap_v2", "linear")),
        ):
            if choice not in known:
                raise ConfigError(f"objective.{name} must be {' or '.join(known)}, got {choice!r}")
        if not 1 <= sampling_steps <= 1000:
            raise ConfigError(f"objective.sampling_steps must be from 1 to 1000, got {sampling_steps}")
        for name, value in (("blur", blur), ("grain", grain), ("edges", edges)):
            if not value >= 0:
                raise ConfigError(f"objective.{name} must be at least 0, got {value}")
        upsampler: Any = networks.upsampler(model)
        self.size: int = upsampler.config.sample_size
        self.name = "upsampler_1024" if self.size > 256 else "super_res_first"  # the pipeline's names, from Karlo's
        self.trained = nn.ModuleDict({self.name: upsampler})
        self.examples = self.load_examples(data, "train", seed)
        self.validation = self.load_examples(data, "validation")
        self.crop = round((data or {}).get("crop", 0.25) * self.size)  # pixels a side
        if degrade == "bsr":
            self.examples, self.validation = (Degraded(e, seed, SCALE) for e in (self.examples, self.validation))
        self.loss, self.is_noise_conditioned = loss, networks.is_noise_conditioned(upsampler)
        self.seed, self.blur, self.grain, self.edges = seed, blur, grain, edges
        self.schedule, self.sampling_steps = schedule(prediction_type, beta_schedule), sampling_steps

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> Dataset[Any]:
        return crop_examples(data, self.size, split, seed)

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.trained[name].state_dict()
        new = {k: v for k, v in own.items() if k.startswith("class_embedding.") and k not in state}
        last = max((k.rsplit(".", 1)[0] for k in new), default="")
        return state | {k: torch.zeros_like(v) if k.rsplit(".", 1)[0] == last else v for k, v in new.items()}

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        move_schedule(self.schedule, batch["image"].device)
        return batch

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        sharp = normalize(batch["image"])
        low, sigma = self.low_resolution(sharp, batch)
        resized = resize(low, sharp.shape[-1])
        noise = seeded_noise(self.seed + IMAGE_NOISE, batch["index"], sharp)
        timesteps = uniform_timesteps(batch["random"][:, TIMESTEP], self.schedule.config.num_train_timesteps)
        noised = self.schedule.add_noise(sharp, noise, timesteps)
        predicted = self._predict(noised, resized, timesteps, sigma)
        clean = predict_x0(self.schedule, predicted, noised, timesteps)
        if self.loss == "mse":
            loss = (predicted - target(self.schedule, sharp, noise, timesteps)).square().mean()
        else:
            loss = charbonnier(clean - sharp)
        if self.edges:
            loss = loss + self.edges * charbonnier(_differences(clean) - _differences(sharp))
        return loss, {"psnr": psnr(clean.detach(), sharp), "psnr_bicubic": psnr(resized, sharp)}

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        batch = {"index": torch.arange(size), "random": torch.full((size, COLUMNS), 0.5)}
        batch["image"] = torch.zeros(size, 3, self.crop, self.crop, dtype=torch.uint8)
        if isinstance(self.examples, Degraded):
            batch["low"] = torch.zeros(size, 3, self.crop // SCALE, self.crop // SCALE, dtype=torch.uint8)
        return batch

    def low_resolution(self, sharp: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The low-resolution images and the standard deviation [B] of the noise on them."""
        blur = 0.0 if "low" in batch else self.blur
        low = normalize(batch["low"]) if "low" in batch else F.avg_pool2d(sharp, SCALE)
        sigma = self.grain * batch["random"][:, NOISE_LEVEL]
        if "low" in batch and not self.is_noise_conditioned:
            return low, torch.zeros_like(sigma)
        grain = seeded_noise(self.seed + CONDITION_NOISE, batch["index"], low)
        return corrupt(low, batch["random"], grain, blur, self.grain), sigma

    def _predict(self, noised: Tensor, resized: Tensor, timesteps: Tensor, sigma: Tensor) -> Tensor:
        level = {"class_labels": noise_labels(sigma)} if self.is_noise_conditioned else {}
        return self.trained[self.name](torch.cat([noised, resized], 1), timesteps, **level).sample.float()

    def _upsample(self, low: Tensor, indices: Tensor, sigma: Tensor) -> Tensor:
        resized = resize(low, low.shape[-1] * SCALE)
        start = seeded_noise(self.seed, indices, resized)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._predict(x, resized, t, sigma)

        return denoise(predict, start, ddim(self.schedule), self.sampling_steps).clamp(-1, 1)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB of sampled crops of held-out concepts from clean low-resolution ones, beside bicubic."""
        batch = self.held_out_batch(VALIDATION_EXAMPLES)
        sharp = normalize(batch["image"])
        low = F.avg_pool2d(sharp, SCALE)
        sampled = self._upsample(low, batch["index"], low.new_zeros(len(low)))
        return {"psnr": psnr(sampled, sharp).item(), "psnr_bicubic": psnr(resize(low, sharp.shape[-1]), sharp).item()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out crops: low-resolution, bicubic, sampled, true."""
        batch = self.held_out_batch(8)
        sharp = normalize(batch["image"])
        low, sigma = self.low_resolution(sharp, batch)
        nearest = F.interpolate(low, scale_factor=SCALE)
        rows = [nearest, resize(low, sharp.shape[-1]), self._upsample(low, batch["index"], sigma), sharp]
        return grid(torch.cat(rows) / 2 + 0.5, 8)

    def components(self) -> dict[str, Any]:
        return {**self.trained, f"{self.name}_scheduler".replace("_first", ""): ddim(self.schedule)}


def charbonnier(error: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of a differentiable absolute value."""
    return (error.square() + eps**2).sqrt().mean()


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Mean peak signal-to-noise ratio in dB of images in [-1, 1]."""
    error = ((images.clamp(-1, 1) - truth) / 2).square().mean((1, 2, 3)).clamp_min(1e-8)
    return (-10 * error.log10()).mean()


def _differences(images: Tensor) -> Tensor:
    across = images[..., :-1, 1:] - images[..., :-1, :-1]
    down = images[..., 1:, :-1] - images[..., :-1, :-1]
    return torch.cat([across, down], 1)
