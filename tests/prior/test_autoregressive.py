"""The autoregressive prior."""

import pytest
import torch
from conftest import randomise, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from prior import AutoregressivePrior

SIZES = {"embedding_dim": 24, "num_embeddings": 6, "components": 8, "buckets": 16, "dot_buckets": 8, "width": 32, "layers": 2}


def embeddings(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of which a few directions hold most of the variance, and texts that lean to them."""
    g = torch.Generator().manual_seed(3)
    spread = 2.0 ** -torch.arange(24, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=torch.float64))[0]
    images = torch.randn(count, 24, generator=g, dtype=torch.float64) * spread @ turn + 0.3
    texts = images + torch.randn(count, 24, generator=g, dtype=torch.float64)
    return tuple(torch.nn.functional.normalize(e, dim=-1) for e in (images, texts))


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "with a text encoder"])
def prior(request) -> AutoregressivePrior:
    network = AutoregressivePrior(**SIZES, head_dim=16, text_width=16, text_layers=request.param)
    network = randomise(network, scale=0.3).double()
    network.fit(*embeddings())
    return network


def conditions(rows: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    text, encodings = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, 24), (rows, 6, 24)))
    mask = torch.ones(rows, 6, dtype=torch.bool)
    mask[::2, 4:] = False
    return text, encodings, mask


def test_quantising_is_undone_up_to_a_bucket_and_the_components_left_out(prior):
    images, _ = embeddings()
    tokens = prior.quantise(images)
    assert tokens.min() >= 0 and tokens.max() < 16 and len(tokens.unique()) > 8
    assert torch.nn.functional.cosine_similarity(prior.dequantise(tokens), images).mean() > 0.97
    assert torch.equal(prior.quantise(prior.dequantise(tokens) if not prior.config.normalize else images), tokens)
    fewer = AutoregressivePrior(**SIZES | {"components": 2, "buckets": 1024}, head_dim=16).double()
    finer = AutoregressivePrior(**SIZES | {"components": 16, "buckets": 1024}, head_dim=16).double()
    errors = []
    for network in (fewer, finer):
        network.fit(*embeddings())
        errors.append((network.dequantise(network.quantise(images)) - images).norm(dim=1).mean())
    assert errors[1] < 0.05 * errors[0]
    assert (finer.clip_std.diff() <= 0).all()  # ordered by falling variance


def test_dot_products_fill_their_buckets_alike(prior):
    counts = torch.bincount(prior.dot_tokens(*embeddings()), minlength=8)
    assert (counts - 50).abs().max() <= 2


@settings(max_examples=8)
@given(at=st.integers(0, 6))
def test_a_component_depends_only_on_those_before_it(prior, at):
    text, encodings, mask = conditions(2)
    dot, tokens = torch.tensor([1, 5]), torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(2))
    base = prior(tokens, dot, text, encodings, mask)
    assert base.shape == (2, 8, 16)
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % 16
    answer = prior(changed, dot, text, encodings, mask)
    torch.testing.assert_close(answer[:, : at + 1], base[:, : at + 1])
    assert not torch.allclose(answer[:, at + 1 :], base[:, at + 1 :])


def test_every_condition_is_seen_and_padding_is_not(prior):
    text, encodings, mask = conditions(2)
    mask[:] = True
    mask[:, 4:] = False
    dot, tokens = torch.tensor([1, 5]), torch.zeros(2, 3, dtype=torch.long)
    base = prior(tokens, dot, text, encodings, mask)
    padded = encodings.clone()
    padded[:, 4:] = 50.0
    torch.testing.assert_close(prior(tokens, dot, text, padded, mask), base)
    torch.testing.assert_close(prior(tokens, dot, text, encodings[:, :4], mask[:, :4]), base)
    drawn = [prior.draw(text, e, m, generator=seeds(1, 2)) for e, m in ((encodings, mask), (encodings[:, :4], mask[:, :4]))]
    torch.testing.assert_close(*drawn)
    for changed in ((dot + 1, text, encodings), (dot, text.flip(1), encodings), (dot, text, encodings + 1)):
        assert not torch.allclose(prior(tokens, *changed, mask), base)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_is_uncached(prior, guidance):
    given = conditions(2 if guidance == 1 else 4)
    drawn = [prior.draw(*given, guidance=guidance, generator=seeds(4, 5), cached=cached) for cached in (True, False)]
    torch.testing.assert_close(*drawn)
    torch.testing.assert_close(drawn[0].norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_a_batch_is_its_rows_one_by_one_and_the_dot_product_is_from_the_top_half(prior):
    text, encodings, mask = conditions(3)
    seen = []

    def prefix(dot, *rest):
        seen.append(dot)
        return AutoregressivePrior._prefix(prior, dot, *rest)

    prior._prefix = prefix
    try:
        batch = prior.draw(text, encodings, mask, generator=seeds(1, 2, 3))
        rows = [prior.draw(text[i : i + 1], encodings[i : i + 1], mask[i : i + 1], generator=seeds(i + 1)) for i in range(3)]
        for seed in range(8):
            prior.draw(text, encodings, mask, generator=seeds(seed, seed + 100, seed + 200), stopped=lambda: True)
    finally:
        del prior._prefix
    torch.testing.assert_close(batch, torch.cat(rows))
    assert torch.cat(seen).min() >= 4 and len(torch.cat(seen).unique()) == 4


def test_what_it_learned_it_draws():
    """Trained on two far-apart embeddings conditioned on their text, it samples the one that the text names."""
    torch.manual_seed(0)
    images, texts = embeddings(64)
    images, texts = images.float(), texts.float()
    prior = AutoregressivePrior(**SIZES, head_dim=16)
    prior.fit(images, texts)
    pair, said = images[[int(prior.quantise(images)[:, 0].argmin()), int(prior.quantise(images)[:, 0].argmax())]], texts[:2]
    encodings = torch.zeros(2, 6, 24)
    tokens = prior.quantise(pair)
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for _ in range(150):
        logits = prior(tokens[:, :-1], torch.randint(4, 8, (2,)), said, encodings)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = prior.eval().draw(said, encodings, generator=seeds(0, 1))
    scores = drawn @ prior.dequantise(tokens).T
    assert torch.equal(scores.argmax(1), torch.arange(2)) and scores.diagonal().min() > 0.9


def test_mistakes_are_named(prior):
    with pytest.raises(ValueError, match=r"components must be from 1 to embedding_dim \(24\), got 25"):
        AutoregressivePrior(**SIZES | {"components": 25}, head_dim=16)
    with pytest.raises(ValueError, match="8 embeddings are too few to find 8 principal components in"):
        prior.fit(*embeddings(8))
    text, encodings, mask = conditions(1)
    with pytest.raises(ValueError, match="may have 6 tokens, got 12"):
        prior.draw(text, encodings.repeat(1, 2, 1), mask.repeat(1, 2))
