"""Distilling the decoder: an adapter replaces its guidance and most of its steps (arXiv 2202.00512, 2210.03142)."""

# B trajectories, C channels, R resolution, E evaluations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...data.examples import seeded_noise
from ...diffusion.predictions import target
from ...diffusion.sampling import DenoisingOptions, Predict, denoise, shift_timesteps
from ...diffusion.schedules import dpm_solver, levels
from ...io.checkpoints import components_folder, resolve
from ...io.hub import DISTILLED_FILE
from ...pipelines.distilled import Distilled, fingerprint
from ...runtime.config import ConfigError
from .base import Objective, grid
from .conditioned import to_floats
from .decoder import SAMPLES, DecoderObjective
from .random_columns import IMAGE_NOISE

# Every convolution and linear layer: guidance and steps do not depend on attention alone.
TARGETS = ["qkv", "context_kv", "out", "conv_in", "conv_out", "conv", "skip", "modulation"]
TARGETS += ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
ADAPTER = {"rank": 32, "targets": TARGETS}


@dataclass
class TeacherTrajectory:
    """The frozen decoder's way from noise to an image at the borders of its parts: `latents` [E + 1, B, C, R, R], noise first.

    `conditions` are the decoder's arguments beside sample and timestep, `inpainting` [B, 0 or 4, R, R] the further channels
    of an inpainting decoder, and `images` [B, C, R, R] the examples' own.
    """

    latents: Tensor
    conditions: dict[str, Tensor]
    inpainting: Tensor
    images: Tensor


class DecoderDistillObjective(Objective):
    """An adapter on a frozen decoder learns to sample in `evaluations` unguided steps what that samples in many guided ones.

    The frozen decoder, the teacher, samples each example from noise, by DPM-Solver++ in `teacher_steps` under `guidance`. Its
    trajectory is cut into `evaluations` parts of as many steps each, and the adapted decoder, the student, learns to go from
    the start of each part to its end in one step of DDIM: all of progressive distillation's halvings (arXiv 2202.00512,
    section 3) and guidance's (arXiv 2210.03142, section 3.1) at once, at the noise levels alone that are sampled at. The
    error is that of the network's prediction. A `timestep_shift` above 1 makes the parts at high noise shorter
    (`shift_timesteps`); the adapter is sampled with it too.

    `init_from` names the frozen decoder, `adapter` a file, run or pipeline's folder with an adapter to continue from: that of
    a decoder which was trained further since, for example. The run leaves the adapter as the file that a pipeline's folder
    takes. A batch counts trajectories, each of which is `evaluations` examples.
    """

    shardable = False  # shards would have to follow the adapter as it is switched on and off
    decoder_objective: type[DecoderObjective] = DecoderObjective
    starts: Tensor
    alphas: Tensor

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        guidance: float = 3.0,
        evaluations: int = 4,
        teacher_steps: int = 8,
        timestep_shift: float = 1.0,
        drop_image: float = 0.05,
        drop_text: float = 0.1,
        embedding_noise: float = 0.5,
        prediction_type: str = "v_prediction",
        resolution: int | None = None,
        lora: dict | None = None,
        adapter: str | None = None,
    ):
        super().__init__()
        self.base = self.decoder_objective(
            model,
            data,
            seed,
            clip,
            drop_image=drop_image,
            drop_text=drop_text,
            embedding_noise=embedding_noise,
            prediction_type=prediction_type,
            resolution=resolution,
            lora=ADAPTER | (lora or {}),
        )
        self.examples, self.validation = self.base.examples, self.base.validation
        self.trained, self.frozen, self.lora = self.base.trained, self.base.frozen, self.base.lora
        self.schedule = self.base.schedule
        count = self.schedule.config.num_train_timesteps
        if evaluations < 1 or teacher_steps % evaluations or teacher_steps > count:
            raise ConfigError(
                f"objective.teacher_steps must be a multiple of objective.evaluations, got {teacher_steps} and {evaluations}"
            )
        if not guidance >= 1:
            raise ConfigError(f"objective.guidance must be at least 1, got {guidance}")
        if not 0.01 <= timestep_shift <= 100:
            raise ConfigError(f"objective.timestep_shift must be from 0.01 to 100, got {timestep_shift}")
        self.guidance, self.evaluations, self.teacher_steps = float(guidance), evaluations, teacher_steps
        self.shift = float(timestep_shift)
        starts = torch.tensor(shift_timesteps(evaluations, self.shift, count))  # [E]
        self.register_buffer("starts", starts, persistent=False)
        alphas = torch.cat([self.schedule.alphas_cumprod[starts], torch.ones(1)])  # [E + 1]
        self.register_buffer("alphas", alphas, persistent=False)
        self.teacher_fingerprint: str | None = None
        self.initial_adapter = Distilled.load(_file(adapter)) if adapter else None

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.base.starting_weights(name, state)

    def parameter_groups(self) -> Iterator[tuple[dict[str, nn.Parameter], float]]:
        return self.base.parameter_groups()

    def adapt(self) -> None:
        self.teacher_fingerprint = fingerprint(self.trained["decoder"])
        self.add_adapter()
        if self.initial_adapter is not None:
            self._load_adapter(self.initial_adapter)

    def add_adapter(self) -> None:
        self.base.add_adapter()

    @torch.no_grad()
    def _load_adapter(self, saved: Distilled) -> None:
        """Start from another adapter's weights. Raises ConfigError for one of other layers or another rank."""
        decoder: Any = self.trained["decoder"]
        own = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
        settings = decoder.peft_config["default"]
        factors = {f"{layer}.lora_A.default.weight": down for layer, (down, _) in saved.factors.items()}
        scale = saved.scale * settings.r / settings.lora_alpha
        factors |= {f"{layer}.lora_B.default.weight": scale * up for layer, (_, up) in saved.factors.items()}
        if {n: p.shape for n, p in own.items()} != {n: f.shape for n, f in factors.items()}:
            ranks = ", ".join(map(str, sorted({len(down) for down, _ in saved.factors.values()})))
            raise ConfigError(
                f"objective.adapter: it changes {len(saved.factors)} layers at rank {ranks}, and this run {len(own) // 2} at "
                f"rank {settings.r}; take the same model and objective.lora"
            )
        for name, parameter in own.items():
            parameter.copy_(factors[name])

    def compile_networks(self) -> None:
        raise ConfigError("compile=true does not go with the stage decoder_distill, which switches its adapter on and off")

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.base.to_tensors(batch)

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, timesteps = self.student_losses(self.teacher_trajectory(batch))
        return losses.mean(), levels(losses.detach(), timesteps, self.schedule.config.num_train_timesteps)

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        return self.base.dummy_batch(size)

    def dummy_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss with the teacher's forward passes, but without its scheduler, which reads its tables."""
        return self.student_losses(self.teacher_trajectory(batch, self._run_teacher))[0].mean()

    @torch.no_grad()
    def teacher_trajectory(
        self, batch: dict[str, Tensor], sample: Callable[[Predict, Tensor], list[Tensor]] | None = None
    ) -> TeacherTrajectory:
        """The teacher's trajectories for a batch's captions and embeddings.

        `sample(predict, noise)` returns the latents at the borders of the parts; default: by the teacher's scheduler.
        """
        base = self.base
        images, image_embeds = base.images_and_embeddings(batch)
        inpainting = base.inpainting_input(images, batch["random"])
        text, image_embeds = base.condition_inputs(batch, image_embeds)
        conditional = base.conditions(text, image_embeds, base.style(batch))
        guided = base.guided_conditions(batch, conditional)
        noise = seeded_noise(base.seed + IMAGE_NOISE, batch["index"], images)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            halves = len(x) // len(images)
            conditions = guided if halves == 2 else conditional
            return self.predict(x, t.expand(len(x)), conditions, inpainting.repeat(halves, 1, 1, 1))

        with self.without_adapter():
            latents = (sample or self._sample_teacher)(predict, noise)
        return TeacherTrajectory(torch.stack(latents), conditional, inpainting, images)

    def _sample_teacher(self, predict: Predict, noise: Tensor) -> list[Tensor]:
        latents, part = [noise], self.teacher_steps // self.evaluations

        def keep(number: int, t: Tensor, x: Tensor, *_: object) -> Tensor:
            if (number + 1) % part == 0:
                latents.append(x)
            return x

        teacher = dpm_solver(self.schedule.config)
        options = DenoisingOptions(guidance=self.guidance, shift=self.shift, on_step=keep)
        denoise(predict, noise, teacher, self.teacher_steps, options)
        return latents

    def _run_teacher(self, predict: Predict, noise: Tensor) -> list[Tensor]:
        """The teacher's forward passes, each on the noise."""
        inputs = noise if self.guidance == 1 else torch.cat([noise] * 2)
        for _ in range(self.teacher_steps):
            predict(inputs, self.starts[:1])
        return [noise] * (self.evaluations + 1)

    def student_losses(self, trajectory: TeacherTrajectory) -> tuple[Tensor, Tensor]:
        """Losses [E * B] of the trajectories' parts and their timesteps [E * B]."""
        count = trajectory.latents.shape[1]
        starts, table = self.starts.repeat_interleave(count), self.alphas.to(trajectory.latents)
        first_level, last_level = (t.repeat_interleave(count)[:, None, None, None] for t in (table[:-1], table[1:]))
        first, last = trajectory.latents[:-1].flatten(0, 1), trajectory.latents[1:].flatten(0, 1)
        wanted = target(self.schedule, *solve_x0_and_noise(first, first_level, last, last_level), starts)
        conditions = {k: c.repeat(self.evaluations, *[1] * (c.ndim - 1)) for k, c in trajectory.conditions.items()}
        predicted = self.predict(first, starts, conditions, trajectory.inpainting.repeat(self.evaluations, 1, 1, 1))
        return self.base.squared_error(predicted, wanted, starts), starts

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Within a `with`, the decoder is the teacher."""
        decoder: Any = self.trained["decoder"]
        adapted = bool(getattr(decoder, "peft_config", None))
        if adapted:
            decoder.disable_adapters()
        try:
            yield
        finally:
            if adapted:
                decoder.enable_adapters()

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], inpainting: Tensor) -> Tensor:
        """The decoder's prediction [B, 3, R, R], without the variance of a decoder that has learned it."""
        inputs = torch.cat([noised, inpainting], 1)
        return self.trained["decoder"](inputs, timesteps, **conditions).sample[:, :3].float()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out examples, and the mean square between images [-1, 1] of few steps and of the teacher's many."""
        trajectory = self.teacher_trajectory(self.held_out_batch(SAMPLES))
        losses, timesteps = self.student_losses(trajectory)
        found = levels(losses, timesteps, self.schedule.config.num_train_timesteps)
        few = self.sample_student(trajectory, self.evaluations)
        return to_floats(found | {"loss": losses.mean(), "apart": (few - trajectory.latents[-1]).square().mean()})

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out scenes: true images; the teacher's, guided; the student's of `evaluations` steps and of one."""
        trajectory = self.teacher_trajectory(self.held_out_batch(SAMPLES))
        rows = [trajectory.images, trajectory.latents[-1]]
        rows += [self.sample_student(trajectory, steps) for steps in (self.evaluations, 1)]
        return grid(torch.cat(rows) / 2 + 0.5, SAMPLES)

    def sample_student(self, trajectory: TeacherTrajectory, steps: int) -> Tensor:
        """What the student samples in `steps` from a trajectory's noise: [B, C, R, R]."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.predict(x, t.expand(len(x)), trajectory.conditions, trajectory.inpainting)

        solver = dpm_solver(self.schedule.config, order=1)
        return denoise(predict, trajectory.latents[0], solver, steps, DenoisingOptions(shift=self.shift))

    def distilled(self) -> Distilled:
        """The adapter as a pipeline takes it."""
        from peft import get_peft_model_state_dict

        decoder: Any = self.trained["decoder"]
        state = get_peft_model_state_dict(decoder, adapter_name="default")
        settings = decoder.peft_config["default"]
        facts: dict[str, Any] = {"evaluations": self.evaluations, "guidance": self.guidance, "shift": self.shift}
        facts["decoder"] = self.teacher_fingerprint
        return Distilled.of_adapter(state, scale=settings.lora_alpha / settings.r, **facts)

    def components(self) -> dict[str, Any]:
        return {}

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.distilled().save(folder / DISTILLED_FILE)


def _file(adapter: str) -> Path:
    """The file of an adapter, which is named by itself, its run or a pipeline's folder."""
    path = Path(adapter) if Path(adapter).is_file() else components_folder(resolve(adapter)) / DISTILLED_FILE
    if not path.is_file():
        raise ConfigError(f"objective.adapter={adapter} holds no {DISTILLED_FILE}")
    return path


def solve_x0_and_noise(first: Tensor, first_level: Tensor, second: Tensor, second_level: Tensor) -> tuple[Tensor, Tensor]:
    """The x0 and noise e of which `first` and `second` are both sqrt(a) x0 + sqrt(1 - a) e, at levels a that differ."""
    a, b = first_level.sqrt(), (1 - first_level).sqrt()
    c, d = second_level.sqrt(), (1 - second_level).sqrt()
    determinant = a * d - b * c
    return (d * first - b * second) / determinant, (a * second - c * first) / determinant
