"""Pipelines whose prior draws its embeddings token by token, without a scheduler."""

import copy

import pytest
import torch
from conftest import TINY_DEFAULTS, randomise, seeds, tiny_networks

from prior import AutoregressivePrior
from unclip import CLIP, UnCLIPPipeline, UnCLIPPriorPipeline

SIZES = {"embedding_dim": 32, "num_embeddings": 16, "components": 12, "buckets": 8, "dot_buckets": 4, "width": 32, "layers": 1}


@pytest.fixture(scope="module")
def pipe() -> UnCLIPPipeline:
    torch.manual_seed(0)  # fresh networks, whose weights would depend on the tests before; of eight the first may be the best
    prior = randomise(AutoregressivePrior(**SIZES, head_dim=16), scale=0.3)
    g = torch.Generator().manual_seed(0)
    prior.fit(*(torch.randn(64, 32, generator=g) for _ in range(2)))
    networks = tiny_networks() | {"prior": prior, "prior_scheduler": None}
    pipe = UnCLIPPipeline(**networks, defaults=TINY_DEFAULTS).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(pipe, prompts, *numbers, **kwargs) -> torch.Tensor:
    return UnCLIPPriorPipeline.from_pipe(pipe)(prompts, generator=seeds(*numbers), **kwargs).image_embeds


def test_it_draws_and_comes_back_from_disk_the_same(pipe, tmp_path):
    image = pipe("a star", generator=seeds(3), size=64, output_type="pt").images
    pipe.save_pretrained(tmp_path)
    again = UnCLIPPipeline.from_pretrained(tmp_path, dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    assert again.prior_scheduler is None
    torch.testing.assert_close(again("a star", generator=seeds(3), size=64, output_type="pt").images, image)
    assert not torch.equal(pipe("a star", generator=seeds(4), size=64, output_type="pt").images, image)


def test_a_batch_is_its_prompts_one_by_one_and_two_candidates_come_nearer(pipe):
    whole = embeds(pipe, ["a star", "two red moons"], 1, 2)
    alone = [embeds(pipe, p, n) for p, n in (("a star", 1), ("two red moons", 2))]
    torch.testing.assert_close(whole, torch.cat(alone))
    text = CLIP(pipe.text_encoder, pipe.tokenizer, pipe.image_encoder, pipe.feature_extractor).encode_text("a star")
    scores = [float((embeds(pipe, "a star", 5, prior_candidates=k) * text).sum()) for k in (1, 2, 8)]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    assert not torch.allclose(embeds(pipe, "a star", 1, prior_guidance_scale=1.0), whole[:1])


def test_it_draws_in_half_precision(pipe):
    """As it does by itself on a CPU that is fast in bfloat16."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    half = UnCLIPPipeline(**parts, defaults=TINY_DEFAULTS).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    drawn, exact = (embeds(p, ["a star"] * 2, 3, 4, prior_candidates=1).double() for p in (half, pipe))
    assert torch.cosine_similarity(drawn, exact).min() > 0.5, "a token or two may round to another bucket"
    assert torch.isfinite(half("a star", generator=seeds(3), size=64, output_type="pt").images).all()


def test_a_callback_sees_every_token_and_may_end_it(pipe):
    seen = []

    def callback(which, step, timestep, given):
        seen.append((which.stage, step, tuple(given["latents"].shape)))
        which._interrupt = step == 4

    prior = UnCLIPPriorPipeline.from_pipe(pipe)
    prior.set_progress_bar_config(disable=True)
    prior("a star", generator=seeds(1), prior_candidates=1, callback_on_step_end=callback)
    assert seen == [("prior", n, (1, n + 1)) for n in range(5)]


def test_what_does_not_go_together_is_named(pipe):
    with pytest.raises(ValueError, match="DiffusionPrior is a diffusion prior and needs a prior_scheduler"):
        UnCLIPPipeline(**tiny_networks() | {"prior_scheduler": None})
    with pytest.raises(ValueError, match="prior_latents: an autoregressive prior starts from no noise"):
        pipe("a star", prior_latents=torch.zeros(1, 32), size=64)
