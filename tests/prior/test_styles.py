"""The style token of the prior."""

import torch
from conftest import randomise

from prior import DiffusionPrior
from prior.cache import predictor

SIZES = {"embedding_dim": 32, "num_embeddings": 8, "width": 32, "layers": 2, "head_dim": 16}
STYLES = ["flat", "3d"]


def inputs(rows: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    noised, text, encodings = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, 32), (rows, 32), (rows, 8, 32))
    )
    return noised, text, encodings, torch.arange(8)[None] < torch.tensor([[3], [8], [5]])[:rows]


def test_a_new_style_token_changes_nothing():
    plain = randomise(DiffusionPrior(**SIZES)).double()
    styled = DiffusionPrior(**SIZES, styles=STYLES).double()
    assert styled.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["style_embedding.weight"]
    noised, *text = inputs(3)
    answers = [p(noised, 300, *text).predicted_image_embedding for p in (plain, styled)]
    torch.testing.assert_close(*answers)


def test_styles_and_no_style_differ():
    prior = randomise(DiffusionPrior(**SIZES, styles=STYLES)).double()
    noised, *text = inputs(3)
    answers = [prior(noised, 300, *text, style=torch.full((3,), n)).predicted_image_embedding for n in (0, 1, 2)]
    torch.testing.assert_close(prior(noised, 300, *text).predicted_image_embedding, answers[2])
    assert all(not torch.allclose(a, b) for n, a in enumerate(answers) for b in answers[:n])


def test_cached_equals_uncached_with_a_style_for_each_row():
    prior = randomise(DiffusionPrior(**SIZES, styles=STYLES)).double()
    _, *text = inputs(3)
    style = torch.tensor([1, 2, 0])
    predict = predictor(prior, *text, repeats=2, style=style)
    noised = torch.randn(6, 32, dtype=torch.float64)
    repeated = [v.repeat_interleave(2, 0) for v in text]
    for t in (999, 0):
        expected = prior(noised, t, *repeated, style=style.repeat_interleave(2, 0)).predicted_image_embedding
        torch.testing.assert_close(predict(noised, torch.tensor(t)), expected)
