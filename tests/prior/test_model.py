"""The diffusion prior."""

import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

from prior import DiffusionPrior


@pytest.fixture(scope="module")
def prior() -> DiffusionPrior:
    return randomise(DiffusionPrior(embedding_dim=32, num_embeddings=8, width=32, layers=2, head_dim=16)).double()


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((batch, 32), (batch, 32), (batch, 8, 32))]
    return (*made, torch.ones(batch, 8, dtype=torch.bool))


@settings(max_examples=10)
@given(length=st.integers(1, 7))
def test_padding_is_not_seen(prior, length):
    noised, text, encodings, mask = inputs()
    mask[:, length:] = False
    changed = encodings.clone()
    changed[:, length:] = 100.0
    answers = [prior(noised, 10, text, e, mask).predicted_image_embedding for e in (encodings, changed)]
    torch.testing.assert_close(*answers)
    left_out = prior(noised, 10, text, encodings[:, :length], mask[:, :length]).predicted_image_embedding
    torch.testing.assert_close(left_out, answers[0])


def test_every_input_is_seen(prior):
    noised, text, encodings, mask = inputs()
    base = prior(noised, 10, text, encodings, mask).predicted_image_embedding
    for changed in (
        (noised + 1, 10, text, encodings),
        (noised, 500, text, encodings),
        (noised, 10, text + 1, encodings),
        (noised, 10, text, encodings + 1),
    ):
        assert not torch.allclose(prior(*changed, mask).predicted_image_embedding, base)


def test_batch_equals_one_by_one(prior):
    noised, text, encodings, mask = inputs(3)
    t = torch.tensor([1, 500, 999])
    batch = prior(noised, t, text, encodings, mask).predicted_image_embedding
    rows = [
        prior(noised[i : i + 1], t[i], text[i : i + 1], encodings[i : i + 1], mask[i : i + 1]).predicted_image_embedding
        for i in range(3)
    ]
    torch.testing.assert_close(batch, torch.cat(rows))


def test_whitening_round_trip():
    prior = DiffusionPrior(embedding_dim=32, num_embeddings=8, width=32, layers=1, head_dim=16).double()
    embeds = torch.nn.functional.normalize(torch.randn(64, 32, dtype=torch.float64) + 0.3, dim=-1)
    prior.clip_mean.copy_(embeds.mean(0, keepdim=True))
    prior.clip_std.copy_(embeds.std(0, keepdim=True))
    white = prior.whiten(embeds)
    torch.testing.assert_close(white.std(0), torch.ones(32, dtype=torch.float64))
    torch.testing.assert_close(prior.post_process_latents(white), embeds)


def test_too_many_tokens_are_named(prior):
    noised, text, encodings, mask = inputs()
    with pytest.raises(ValueError, match="8 tokens, got 16"):
        prior(noised, 10, text, encodings.repeat(1, 2, 1), mask.repeat(1, 2))
