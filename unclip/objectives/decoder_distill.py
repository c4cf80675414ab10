"""Distilling the decoder: an adapter takes over its guidance, then most of its steps (arXiv 2210.03142, 2403.06807)."""

# B batch, C channels, R resolution, K teacher steps

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import ConfigError
from ..data.examples import seeded_noise
from ..diffusion import clean_from, ddim, target
from ..distilled import FILE, Distilled, fingerprint
from ..sampling import denoise, guide
from .base import grid
from .decoder import SHOWN, DecoderObjective

# Every convolution and linear layer: guidance and steps are no matter of attention alone.
TARGETS = ["qkv", "context_kv", "out", "conv_in", "conv_out", "conv", "skip", "modulation"]
TARGETS += ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
ADAPTER = {"rank": 32, "targets": TARGETS}


class DecoderDistillObjective(DecoderObjective):
    """An adapter on a frozen decoder learns to draw in `evaluations` unguided steps what that draws in many guided ones.

    The first `guidance_examples` teach guidance: the adapted decoder answers alone as the frozen one does under `guidance`
    (arXiv 2210.03142, section 3.1). The others teach multistep consistency (arXiv 2403.06807, section 3): the way from
    noise to picture is cut into `evaluations` parts, and from each of the frozen decoder's `teacher_steps` noise levels one
    step of DDIM shall lead to the end of its part, to where the guided ODE leads. The target is one step of the frozen
    decoder and then the adapted one's own, without a gradient. Both errors are of what the network predicts; the first is
    what the second becomes where parts are one step long.

    `init_from` names the frozen decoder. The run leaves the adapter as the file that a pipeline's folder takes.
    """

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        guidance: float = 3.0,
        evaluations: int = 4,
        teacher_steps: int = 32,
        guidance_examples: int = 0,
        drop_image: float = 0.05,
        drop_text: float = 0.1,
        embedding_noise: float = 0.5,
        prediction_type: str = "v_prediction",
        resolution: int | None = None,
        lora: dict | None = None,
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
        self.guidance, self.evaluations, self.teacher_steps = float(guidance), evaluations, teacher_steps
        self.guidance_examples = guidance_examples
        sampler = ddim(self.schedule)
        sampler.set_timesteps(teacher_steps)
        # of the teacher's noise levels, from the clean picture at 0 to pure noise at K
        self.steps = torch.cat([torch.tensor([-1]), sampler.timesteps.flip(0)])  # [K + 1]
        self.of_frozen: str | None = None

    shardable = False  # parts would have to follow the adapter as it goes on and off

    def adapt(self) -> None:
        self.of_frozen = fingerprint(self.trained["decoder"])
        super().adapt()

    def compile_networks(self) -> None:
        raise ConfigError("compile=true does not go with the stage decoder_distill, which switches its adapter on and off")

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per-example losses [B] and their timesteps [B]."""
        clean, image_embeds = self._pictures(batch)
        known = self._known(clean, batch["random"])
        alone, guided = self._both_conditions(batch, image_embeds)
        device = clean.device
        number = 1 + (batch["random"][:, 2].double() * self.teacher_steps).long().clamp(0, self.teacher_steps - 1)
        part = self.teacher_steps // self.evaluations
        end = (number - 1) // part * part
        of_guidance = (batch["index"] < self.guidance_examples).to(number.device) & self.training
        end = torch.where(of_guidance, number - 1, end)
        here, there, end = (self.steps.to(device)[n.to(device)] for n in (number, number - 1, end))
        noise = seeded_noise(self.seed, batch["index"], tuple(clean.shape[1:])).to(clean)
        noised = self.schedule.add_noise(clean, noise, here)
        with torch.no_grad():
            with self._frozen():
                answer = self._predict(torch.cat([noised] * 2), here.repeat(2), guided, known.repeat(2, 1, 1, 1))
            nearer = self._moved(guide(answer, 3, self.guidance), noised, here, there)
            # where the part ends here already, this moves nothing
            answer = self._predict(nearer, there.clamp_min(0), alone, known)
            landed = torch.where((there == end)[:, None, None, None], nearer, self._moved(answer, nearer, there, end))
            picture, rest = through(noised, self._alpha_bar(here), landed, self._alpha_bar(end))
            wanted = target(self.schedule, picture, rest, here)
        return self._squared_error(self._predict(noised, here, alone, known), wanted, here), here

    def _both_conditions(self, batch: dict[str, Tensor], image_embeds: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Context, addition to the time embedding and mask: of the examples [B, ...]; with the empty ones before [2B, ...]."""
        with torch.no_grad():
            text, image_embeds = self._heard(batch, image_embeds)
            null = self.trained["text_proj"].learned_classifier_free_guidance_embeddings.expand(len(image_embeds), -1)
            empty = self._conditions(self.frozen.text([""] * len(image_embeds)), null)
            alone = self._conditions(text, image_embeds)
        return list(alone), [torch.cat(pair) for pair in zip(empty, alone, strict=True)]

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

    def _predict(self, noised: Tensor, timesteps: Tensor, conditions: list[Tensor], known: Tensor) -> Tensor:
        context, added, mask = conditions
        seen = torch.cat([noised, known], 1)
        answer = self.trained["decoder"](seen, timesteps, context, class_labels=added, attention_mask=mask).sample
        return answer[:, :3].float()

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        """[B, 1, 1, 1]; timestep -1 is the clean picture."""
        table = torch.cat([torch.ones(1), self.schedule.alphas_cumprod]).to(timesteps.device)
        return table[timesteps + 1][:, None, None, None]

    def _moved(self, prediction: Tensor, noised: Tensor, timesteps: Tensor, to: Tensor) -> Tensor:
        """One step of DDIM from `timesteps` to `to`, both [B] (arXiv 2010.02502, equation 12)."""
        # at -1, where nothing is left to move, any finite answer will do
        picture = clean_from(self.schedule, prediction, noised, timesteps.clamp_min(0))
        alpha_bar, goal = self._alpha_bar(timesteps.clamp_min(0)), self._alpha_bar(to)
        rest = (noised - alpha_bar.sqrt() * picture) / (1 - alpha_bar).sqrt()
        return goal.sqrt() * picture + (1 - goal).sqrt() * rest

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out examples, and the mean square between pictures [-1, 1] of few steps and of the teacher's many."""
        batch = self._held_out(SHOWN)
        few, many = self._drawn(batch, self.evaluations), self._drawn(batch, None)
        return super().validate() | {"apart": (few - many).square().mean().item()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Held-out scenes: true pictures; the frozen decoder's, guided; the adapted one's of `evaluations` steps and of one."""
        batch = self._held_out(SHOWN)
        rows = [self._pictures(batch)[0], self._drawn(batch, None), self._drawn(batch, self.evaluations), self._drawn(batch, 1)]
        return grid(torch.cat(rows) / 2 + 0.5, SHOWN)

    def _drawn(self, batch: dict[str, Tensor], steps: int | None) -> Tensor:
        """Pictures [B, 3, R, R] of the adapted decoder in `steps`; None: of the frozen one in all of its own, guided."""
        clean, embeds = self._pictures(batch)
        alone, guided = self._both_conditions(batch, embeds)
        known = self._known(clean, batch["random"])
        start = seeded_noise(self.seed, batch["index"], tuple(clean.shape[1:])).to(clean)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            halves = len(x) // len(clean)
            return self._predict(x, t.expand(len(x)), guided if halves == 2 else alone, known.repeat(halves, 1, 1, 1))

        if steps is None:
            with self._frozen():
                return denoise(predict, start, ddim(self.schedule), self.teacher_steps, guidance=self.guidance)
        return denoise(predict, start, ddim(self.schedule), steps)

    def distilled(self) -> Distilled:
        """What has been learned so far."""
        from peft import get_peft_model_state_dict

        decoder = self.trained["decoder"]
        state = get_peft_model_state_dict(decoder, adapter_name="default")
        settings = decoder.peft_config["default"]
        facts = {"evaluations": self.evaluations, "guidance": self.guidance, "decoder": self.of_frozen}
        return Distilled.of_adapter(state, scale=settings.lora_alpha / settings.r, **facts)

    def components(self) -> dict[str, Any]:
        return {}

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.distilled().save(folder / FILE)


def through(first: Tensor, first_level: Tensor, second: Tensor, second_level: Tensor) -> tuple[Tensor, Tensor]:
    """Picture x and noise e of which `first` and `second` are both sqrt(a) x + sqrt(1 - a) e, at levels a that differ."""
    a, b = first_level.sqrt(), (1 - first_level).sqrt()
    c, d = second_level.sqrt(), (1 - second_level).sqrt()
    determinant = a * d - b * c
    return (d * first - b * second) / determinant, (a * second - c * first) / determinant
