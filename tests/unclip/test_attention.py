"""One attention function: its kernels agree."""

from importlib.metadata import version

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior import DiffusionPrior
from prior.blocks import sdpa
from unclip.attention import attention, install


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    heads=st.integers(1, 3),
    masked=st.sampled_from(["no", "keys", "all"]),
    seed=st.integers(0, 99),
)
def test_kernels_agree_forward_and_backward(batch, queries, keys, heads, masked, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, 8, generator=g, dtype=torch.float64) for n in (queries, keys, keys))
    mask = None
    if masked != "no":
        shape = (batch, 1, 1, keys) if masked == "keys" else (1, 1, queries, keys)
        mask = torch.rand(shape, generator=g) > 0.4
        mask[..., 0] = True
    answers, gradients = [], []
    for function in (sdpa, lambda *a: attention(*a, "math"), lambda *a: attention(*a, "sdpa"), attention):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = function(*leaves, mask)
        out.square().sum().backward()
        answers.append(out.detach())
        gradients.append(torch.cat([t.grad.flatten() for t in leaves]))
    for other, gradient in zip(answers[1:], gradients[1:], strict=True):
        torch.testing.assert_close(other, answers[0])
        torch.testing.assert_close(gradient, gradients[0])


def test_installing_reaches_every_layer_and_unknown_names_are_refused():
    prior = DiffusionPrior(embedding_dim=32, num_embeddings=4, width=32, layers=2, head_dim=16)
    before = [b.attention.function for b in prior.blocks]
    install(prior, "math")
    assert all(b.attention.function is not f for b, f in zip(prior.blocks, before, strict=True))
    with pytest.raises(ValueError, match="'flash'"):
        install(prior, "flash")


def test_xformers_is_left_alone_where_there_is_no_gpu(run):
    """It is installed with the tests; diffusers would import it, and it would print a warning."""
    version("xformers")
    code = "import sys, unclip.pipelines; print(any(n.startswith('xformers.') for n in sys.modules))"
    result = run("-c", code)
    assert result.returncode == 0
    expected = torch.cuda.is_available()
    assert result.stdout.strip() == str(expected)
    assert expected or result.stderr == ""
