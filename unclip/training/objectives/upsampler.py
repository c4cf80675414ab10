"""Training the upsamplers (paper, section 2.3): crops, a corrupted low-resolution picture, no text."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

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

VALIDATION_EXAMPLES = 32
SCALE = 4


class UpsamplerObjective(Objective):
    """The sharp crop from a noised one and a corrupted small one.

    `loss` is "charbonnier", on the estimated sharp picture, which keeps edges that a mean square would smear (arXiv
    1710.01992), or "mse", the paper's, on what `prediction_type` asks of the network. `edges` weighs a second Charbonnier
    term on the differences of neighbouring pixels. With `degrade` "blur" the small picture is the crop's 4 x 4 area mean,
    blurred by up to `blur` of its pixels and grained by up to `grain` of the range [-1, 1], as for the paper's first
    upsampler; with "bsr" it went through `upsamplers.degrade.bsr`, as for its second.

    With `model.class_embed_type` "timestep" the network is told how much of `grain` a picture has, with "bsr" too, which
    otherwise has none: noise conditioning (arXiv 2106.15282, section 4). Weights that `init_from` holds of a network that is
    told nothing are carried over.
    """

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
        for name, value, known in (
            ("degrade", degrade, ("blur", "bsr")),
            ("loss", loss, ("charbonnier", "mse")),
            ("beta_schedule", beta_schedule, ("squaredcos_cap_v2", "linear")),
        ):
            if value not in known:
                raise ConfigError(f"objective.{name} must be {' or '.join(known)}, got {value!r}")
        if not 1 <= sampling_steps <= 1000:
            raise ConfigError(f"objective.sampling_steps must be from 1 to 1000, got {sampling_steps}")
        for name, value in (("blur", blur), ("grain", grain), ("edges", edges)):
            if not value >= 0:
                raise ConfigError(f"objective.{name} must be at least 0, got {value}")
        upsampler = networks.upsampler(model)
        self.size = upsampler.config.sample_size
        self.name = "upsampler_1024" if self.size > 256 else "super_res_first"  # the pipeline's names, from Karlo's
        self.trained = nn.ModuleDict({self.name: upsampler})
        self.examples = crop_examples(data, self.size, seed=seed)
        self.validation = crop_examples(data, self.size, "validation")
        if degrade == "bsr":
            self.examples, self.validation = (Degraded(e, seed, SCALE) for e in (self.examples, self.validation))
        self.loss, self.told = loss, networks.is_noise_conditioned(upsampler)
        self.seed, self.blur, self.grain, self.edges = seed, blur, grain, edges
        self.schedule, self.sampling_steps = schedule(prediction_type, beta_schedule), sampling_steps

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
        low, sigma = self._low(sharp, batch)
        resized = resize(low, sharp.shape[-1])
        noise = seeded_noise(self.seed, batch["index"], sharp)
        timesteps = uniform_timesteps(batch["random"][:, 2], self.schedule.config.num_train_timesteps)
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

    def _low(self, sharp: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The low-resolution pictures and the standard deviation [B] of the noise on them."""
        blur = 0.0 if "low" in batch else self.blur
        low = normalize(batch["low"]) if "low" in batch else F.avg_pool2d(sharp, SCALE)
        sigma = self.grain * batch["random"][:, 1]
        if "low" in batch and not self.told:
            return low, torch.zeros_like(sigma)
        grain = seeded_noise(self.seed + 1, batch["index"], low)
        return corrupt(low, batch["random"], grain, blur, self.grain), sigma

    def _predict(self, noised: Tensor, resized: Tensor, timesteps: Tensor, sigma: Tensor) -> Tensor:
        told = {"class_labels": noise_labels(sigma)} if self.told else {}
        return self.trained[self.name](torch.cat([noised, resized], 1), timesteps, **told).sample.float()

    def _upsample(self, low: Tensor, indices: Tensor, sigma: Tensor) -> Tensor:
        resized = resize(low, low.shape[-1] * SCALE)
        start = seeded_noise(self.seed, indices, resized)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._predict(x, resized, t, sigma)

        return denoise(predict, start, ddim(self.schedule), self.sampling_steps).clamp(-1, 1)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB of sampled crops of held-out concepts from clean low-resolution ones, beside bicubic."""
        batch = self._held_out(VALIDATION_EXAMPLES)
        sharp = normalize(batch["image"])
        low = F.avg_pool2d(sharp, SCALE)
        drawn = self._upsample(low, batch["index"], low.new_zeros(len(low)))
        return {"psnr": psnr(drawn, sharp).item(), "psnr_bicubic": psnr(resize(low, sharp.shape[-1]), sharp).item()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out crops: low-resolution, bicubic, drawn, true."""
        batch = self._held_out(8)
        sharp = normalize(batch["image"])
        low, sigma = self._low(sharp, batch)
        nearest = F.interpolate(low, scale_factor=SCALE)
        rows = [nearest, resize(low, sharp.shape[-1]), self._upsample(low, batch["index"], sigma), sharp]
        return grid(torch.cat(rows) / 2 + 0.5, 8)

    def components(self) -> dict[str, Any]:
        return {**self.trained, f"{self.name}_scheduler".replace("_first", ""): ddim(self.schedule)}


def charbonnier(error: Tensor, eps: float = 1e-3) -> Tensor:
    return (error.square() + eps**2).sqrt().mean()


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """Mean peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = ((pictures.clamp(-1, 1) - truth) / 2).square().mean((1, 2, 3)).clamp_min(1e-8)
    return (-10 * error.log10()).mean()


def _differences(pictures: Tensor) -> Tensor:
    across = pictures[..., :-1, 1:] - pictures[..., :-1, :-1]
    down = pictures[..., 1:, :-1] - pictures[..., :-1, :-1]
    return torch.cat([across, down], 1)
