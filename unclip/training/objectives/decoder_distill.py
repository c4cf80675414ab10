"""Distilling the decoder: an adapter takes over its guidance and most of its steps (arXiv 2202.00512, 2210.03142)."""

# B drawings, C channels, R resolution, E evaluations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...data.examples import seeded_noise
from ...diffusion.predictions import target
from ...diffusion.sampling import denoise, shift_timesteps
from ...diffusion.schedules import dpm_solver, levels
from ...io.checkpoints import components_folder, resolve
from ...pipelines.distilled import FILE, Distilled, fingerprint
from ...runtime.config import ConfigError
from .base import grid
from .conditioned import numbers
from .decoder import SHOWN, DecoderObjective

# Every convolution and linear layer: guidance and steps are no matter of attention alone.
TARGETS = ["qkv", "context_kv", "out", "conv_in", "conv_out", "conv", "skip", "modulation"]
TARGETS += ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
ADAPTER = {"rank": 32, "targets": TARGETS}


@dataclass
class Lesson:
    """Drawings of the frozen decoder: the start of each part of their way, noise first, and the pictures [E + 1, B, C, R, R].

    `conditions` are context, addition to the time embedding and mask, and `known` [B, 0 or 4, R, R] is what an inpainting
    decoder sees of `true` [B, C, R, R].
    """

    ends: Tensor
    conditions: tuple[Tensor, Tensor, Tensor]
    known: Tensor
    true: Tensor


class DecoderDistillObjective(DecoderObjective):
    """An adapter on a frozen decoder learns to draw in `evaluations` unguided steps what that draws in many guided ones.

    The frozen decoder draws each example from noise, by DPM-Solver++ in `teacher_steps` under `guidance`. Its way is cut
    into `evaluations` parts of as many steps each, and the adapted decoder learns to go from where each begins to where it
    ends in one step of DDIM: all of progressive distillation's halvings (arXiv 2202.00512, section 3) and guidance's (arXiv
    2210.03142, section 3.1) at once, at the noise levels alone that are drawn with. The error is of what the network predicts.
    A `timestep_shift` above 1 makes the parts at high noise shorter (`shift_timesteps`); the adapter is drawn with it too.

    `init_from` names the frozen decoder, `adapter` a file, run or pipeline's folder to take up an adapter from: that of a
    decoder which has since gone on, say. The run leaves the adapter as the file that a pipeline's folder takes. A batch
    counts drawings, each of which is `evaluations` examples.
    """

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
        super().__init__(
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
        if evaluations < 1 or teacher_steps % evaluations or teacher_steps > self.schedule.config.num_train_timesteps:
            raise ConfigError(
                f"objective.teacher_steps must be a multiple of objective.evaluations, got {teacher_steps} and {evaluations}"
            )
        if not guidance >= 1:
            raise ConfigError(f"objective.guidance must be at least 1, got {guidance}")
        if not 0.01 <= timestep_shift <= 100:
            raise ConfigError(f"objective.timestep_shift must be from 0.01 to 100, got {timestep_shift}")
        self.guidance, self.evaluations, self.teacher_steps = float(guidance), evaluations, teacher_steps
        self.shift = float(timestep_shift)
        starts = torch.tensor(shift_timesteps(evaluations, self.shift, self.schedule.config.num_train_timesteps))  # [E]
        self.register_buffer("starts", starts, persistent=False)
        alphas = torch.cat([self.schedule.alphas_cumprod[starts], torch.ones(1)])  # [E + 1]
        self.register_buffer("alphas", alphas, persistent=False)
        self.of_frozen: str | None = None
        self.begun = adapter and Distilled.load(_file(adapter))

    shardable = False  # parts would have to follow the adapter as it goes on and off

    def adapt(self) -> None:
        self.of_frozen = fingerprint(self.trained["decoder"])
        super().adapt()
        if self.begun:
            self._take_up(self.begun)

    @torch.no_grad()
    def _take_up(self, begun: Distilled) -> None:
        """Start where another adapter ended."""
        own = {n: p for n, p in self.trained["decoder"].named_parameters() if p.requires_grad}
        settings = self.trained["decoder"].peft_config["default"]
        factors = {f"{layer}.lora_A.default.weight": down for layer, (down, _) in begun.factors.items()}
        scale = begun.scale * settings.r / settings.lora_alpha
        factors |= {f"{layer}.lora_B.default.weight": scale * up for layer, (_, up) in begun.factors.items()}
        if {n: p.shape for n, p in own.items()} != {n: f.shape for n, f in factors.items()}:
            ranks = ", ".join(map(str, sorted({len(down) for down, _ in begun.factors.values()})))
            raise ConfigError(
                f"objective.adapter: it changes {len(begun.factors)} layers at rank {ranks}, and this run {len(own) // 2} at "
                f"rank {settings.r}; take the same model and objective.lora"
            )
        for name, parameter in own.items():
            parameter.copy_(factors[name])

    def compile_networks(self) -> None:
        raise ConfigError("compile=true does not go with the stage decoder_distill, which switches its adapter on and off")

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Losses [E * B] of the drawings' parts and their timesteps [E * B]."""
        return self._errors(self._lesson(batch))

    @torch.no_grad()
    def _lesson(self, batch: dict[str, Tensor]) -> Lesson:
        """What the frozen decoder draws of a batch's captions and embeddings, and on which way."""
        true, image_embeds = self._pictures(batch)
        known = self._known(true, batch["random"])
        text, image_embeds = self._heard(batch, image_embeds)
        alone = self._conditions(text, image_embeds, self._style(batch))
        both = self._guided(batch, alone)
        noise = seeded_noise(self.seed, batch["index"], true)
        ends, part = [noise], self.teacher_steps // self.evaluations

        def predict(x: Tensor, t: Tensor) -> Tensor:
            halves = len(x) // len(true)
            return self._predict(x, t.expand(len(x)), both if halves == 2 else alone, known.repeat(halves, 1, 1, 1))

        def keep(number: int, t: Tensor, x: Tensor, *_: object) -> Tensor:
            if (number + 1) % part == 0:
                ends.append(x)
            return x

        with self._frozen():
            teacher = dpm_solver(self.schedule.config)
            denoise(predict, noise, teacher, self.teacher_steps, guidance=self.guidance, shift=self.shift, on_step=keep)
        return Lesson(torch.stack(ends), alone, known, true)

    def _errors(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """What `_losses` says of a lesson."""
        drawings = lesson.ends.shape[1]
        starts, table = self.starts.repeat_interleave(drawings), self.alphas.to(lesson.ends)
        before, after = (t.repeat_interleave(drawings)[:, None, None, None] for t in (table[:-1], table[1:]))
        begun, ended = lesson.ends[:-1].flatten(0, 1), lesson.ends[1:].flatten(0, 1)
        wanted = target(self.schedule, *through(begun, before, ended, after), starts)
        told = {k: c.repeat(self.evaluations, *[1] * (c.ndim - 1)) for k, c in lesson.conditions.items()}
        answer = self._predict(begun, starts, told, lesson.known.repeat(self.evaluations, 1, 1, 1))
        return self._squared_error(answer, wanted, starts), starts

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """The decoder as it was, without its adapter."""
        decoder = self.trained["decoder"]
        adapted = bool(getattr(decoder, "peft_config", None))
        if adapted:
            decoder.disable_adapters()
        try:
            yield
        finally:
            if adapted:
                decoder.enable_adapters()

    def _predict(self, noised: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], known: Tensor) -> Tensor:
        seen = torch.cat([noised, known], 1)
        answer = self.trained["decoder"](seen, timesteps, **conditions).sample
        return answer[:, :3].float()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out examples, and the mean square between pictures [-1, 1] of few steps and of the teacher's many."""
        lesson = self._lesson(self._held_out(SHOWN))
        losses, timesteps = self._errors(lesson)
        found = levels(losses, timesteps, self.schedule.config.num_train_timesteps)
        found |= {"loss": losses.mean(), "apart": (self._few(lesson, self.evaluations) - lesson.ends[-1]).square().mean()}
        return numbers(found)

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out scenes: true pictures; the frozen decoder's, guided; the adapted one's of `evaluations` steps and of one."""
        lesson = self._lesson(self._held_out(SHOWN))
        rows = [lesson.true, lesson.ends[-1], self._few(lesson, self.evaluations), self._few(lesson, 1)]
        return grid(torch.cat(rows) / 2 + 0.5, SHOWN)

    def _few(self, lesson: Lesson, steps: int) -> Tensor:
        """What the adapted decoder draws in `steps` from a lesson's noise: [B, C, R, R]."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._predict(x, t.expand(len(x)), lesson.conditions, lesson.known)

        return denoise(predict, lesson.ends[0], dpm_solver(self.schedule.config, order=1), steps, shift=self.shift)

    def distilled(self) -> Distilled:
        """What has been learned so far."""
        from peft import get_peft_model_state_dict

        decoder = self.trained["decoder"]
        state = get_peft_model_state_dict(decoder, adapter_name="default")
        settings = decoder.peft_config["default"]
        facts = {"evaluations": self.evaluations, "guidance": self.guidance, "shift": self.shift, "decoder": self.of_frozen}
        return Distilled.of_adapter(state, scale=settings.lora_alpha / settings.r, **facts)

    def components(self) -> dict[str, Any]:
        return {}

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.distilled().save(folder / FILE)


def _file(adapter: str) -> Path:
    """The file of an adapter that is named by itself, its run or a pipeline's folder."""
    path = Path(adapter) if Path(adapter).is_file() else components_folder(resolve(adapter)) / FILE
    if not path.is_file():
        raise ConfigError(f"objective.adapter={adapter} holds no {FILE}")
    return path


def through(first: Tensor, first_level: Tensor, second: Tensor, second_level: Tensor) -> tuple[Tensor, Tensor]:
    """Picture x and noise e of which `first` and `second` are both sqrt(a) x + sqrt(1 - a) e, at levels a that differ."""
    a, b = first_level.sqrt(), (1 - first_level).sqrt()
    c, d = second_level.sqrt(), (1 - second_level).sqrt()
    determinant = a * d - b * c
    return (d * first - b * second) / determinant, (a * second - c * first) / determinant
