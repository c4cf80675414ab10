"""The decoder's loss by timestep: it is v's, whatever is predicted, and of the decoder as the pipeline conditions it."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_networks

from unclip.data.icons import IconSet
from unclip.diffusion.schedules import schedule
from unclip.evaluation import prompts as prompt_sets
from unclip.evaluation.context import EvaluationContext
from unclip.evaluation.parts.loss import TIMESTEPS, decoder_errors, posterior_mean, velocity_errors
from unclip.evaluation.sample_store import SampleStore
from unclip.pipelines import UnCLIPPipeline


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_squared_error_of_v():
    training = schedule("v_prediction")
    clean, noise, guess = normal(3, 3, 8, 8).clamp(-1, 1), normal(3, 3, 8, 8, seed=1), normal(3, 3, 8, 8, seed=2)
    found = velocity_errors(training.alphas_cumprod, lambda x, t: guess, clean, noise)
    for column, t in zip(found.T, TIMESTEPS, strict=True):
        signal = training.alphas_cumprod[t]
        noised = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        v = training.get_velocity(clean, noise, torch.full((3,), t))
        guessed = (signal.sqrt() * noised - guess) / (1 - signal).sqrt()
        assert torch.allclose(column, (guessed - v).square().flatten(1).mean(1), rtol=1e-3)
    assert velocity_errors(training.alphas_cumprod, lambda x, t: clean, clean, noise).abs().max() == 0


def test_who_knows_the_image_finds_it_and_who_knows_several_weighs_them():
    training, images = schedule("v_prediction"), normal(5, 3, 8, 8).clamp(-1, 1)
    signal = training.alphas_cumprod[300]
    noised = signal.sqrt() * images + (1 - signal).sqrt() * normal(5, 3, 8, 8, seed=3)
    assert torch.allclose(posterior_mean(noised, images, signal), images, atol=1e-4)
    assert torch.allclose(posterior_mean(noised, images[2:3], signal), images[2:3].expand(5, -1, -1, -1))
    pure = posterior_mean(normal(1, 3, 8, 8), images, torch.tensor(1e-9))
    assert torch.allclose(pure, images.mean(0, keepdim=True), atol=0.01), "from noise alone, the mean"


def bench_of(pipe: UnCLIPPipeline, folder: Path) -> EvaluationContext:
    return EvaluationContext(pipe, None, IconSet.load("shapes"), SampleStore(folder), "dev")


def errors(context: EvaluationContext, prompts: list[prompt_sets.Prompt]) -> torch.Tensor:
    styles = [prompt.truth.style for prompt in prompts]
    return decoder_errors(context, prompts, styles, context.true_embeddings(prompts), context.real_renders(prompts))


def test_it_is_of_the_decoder_as_the_pipeline_conditions_it(tiny, tmp_path):
    context = bench_of(tiny, tmp_path)
    prompts = prompt_sets.recognition(context.icons, "dev")[:3]
    found = errors(context, prompts)
    assert found.shape == (3, len(TIMESTEPS)) and torch.isfinite(found).all() and (found > 0).all()
    assert torch.equal(errors(context, prompts), found), "the noise is the seed's"
    assert torch.allclose(errors(context, prompts[:1]), found[:1], rtol=1e-3), "image by image as together"
    embeds, clean = context.true_embeddings(prompts), context.real_renders(prompts).float() / 127.5 - 1
    tokens = tiny.tokenizer([p.text for p in prompts], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        text = tiny.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        context, added = tiny.text_proj(
            image_embeddings=embeds, prompt_embeds=text.text_embeds, text_encoder_hidden_states=text.last_hidden_state
        )
        t, signal = TIMESTEPS[2], tiny.decoder_scheduler.alphas_cumprod[TIMESTEPS[2]]
        noise = torch.stack([normal(3, 64, 64, seed=n) for n in range(3)])
        noised = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        mask = torch.cat([torch.ones(3, context.shape[1] - tokens.attention_mask.shape[1]), tokens.attention_mask], 1).bool()
        v = tiny.decoder(noised, t, context, class_labels=added, attention_mask=mask).sample
    expected = (v - (signal.sqrt() * noise - (1 - signal).sqrt() * clean)).square().flatten(1).mean(1)
    assert torch.allclose(found[:, 2], expected, rtol=1e-3)


def test_a_decoder_that_predicts_noise_and_its_variance_is_measured_alike(tmp_path):
    from decoder import Decoder
    from unclip.diffusion.schedules import ancestral

    networks = tiny_networks()
    config = dict(networks["decoder"].config)
    torch.manual_seed(0)
    networks["decoder"] = Decoder.from_config(config | {"out_channels": 6})
    networks["decoder_scheduler"] = ancestral(schedule("epsilon"))
    pipe = UnCLIPPipeline(**networks)
    pipe.set_progress_bar_config(disable=True)
    context = bench_of(pipe.to(torch.float32), tmp_path)
    found = errors(context, prompt_sets.recognition(context.icons, "dev")[:2])
    # a fresh decoder answers 0: no noise, so that x0 = x_t / alpha, which is off by sigma / alpha of the noise
    signal = pipe.decoder_scheduler.alphas_cumprod[list(TIMESTEPS)]
    assert torch.allclose(found, (1 / signal).expand(2, -1), rtol=0.05)


def test_what_is_no_prompt_or_embedding_is_refused(tiny):
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny.decoder_prediction([""], torch.zeros(1, 32))
    with pytest.raises(ValueError, match=r"image_embeds must be \[2, 32\], got \[1, 32\]"):
        tiny.decoder_prediction(["a star", "a ring"], torch.zeros(1, 32))
