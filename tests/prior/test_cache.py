"""The prior with a KV cache predicts what the prior does: ours and diffusers'."""

import copy

import pytest
import torch
from conftest import randomise
from diffusers import PriorTransformer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from prior import DiffusionPrior
from prior.cache import predictor
from prior.packed import PackedLinear, packed
from unclip.runtime import attention

SHAPE = {"embedding_dim": 32, "num_embeddings": 8}
STOCK = SHAPE | {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
PRIORS = {
    "ours": lambda: DiffusionPrior(**SHAPE, width=32, layers=3, head_dim=16),
    "stock": lambda: PriorTransformer(**STOCK),
    "stock with norms": lambda: PriorTransformer(**STOCK, norm_in_type="layer", embedding_proj_norm_type="layer"),
    "another sequence": lambda: PriorTransformer(**STOCK, added_emb_type=None, additional_embeddings=3),
}


@pytest.fixture(scope="module", params=PRIORS)
def prior(request):
    return attention.install(randomise(PRIORS[request.param]()).double())


@settings(max_examples=12)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3), repeats=st.integers(1, 3), seed=st.integers(0, 99))
def test_cached_equals_computed_again(prior, lengths, repeats, seed):
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    text, encodings = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, 32), (rows, 8, 32)))
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        answer = predictor(prior, text, encodings, mask, repeats)
        repeated = [v.repeat_interleave(repeats, 0) for v in (text, encodings, mask)]
        for t in (999, 400, 0):
            noised = torch.randn(rows * repeats, 32, generator=g, dtype=torch.float64)
            expected = prior(noised, torch.tensor(t), *repeated).predicted_image_embedding
            torch.testing.assert_close(answer(noised, torch.tensor(t)), expected, rtol=0, atol=1e-9)


def test_a_step_runs_three_tokens(prior):
    """Whatever the text's length; and the padding that all rows share is not even looked at once."""
    blocks = prior.blocks if isinstance(prior, DiffusionPrior) else prior.transformer_blocks
    tokens = []
    norm = blocks[0].norm_attention if isinstance(prior, DiffusionPrior) else blocks[0].norm1
    hook = norm.register_forward_pre_hook(lambda m, args: tokens.append(args[0].shape[1]))
    mask = torch.arange(8)[None] < torch.tensor([[2], [5]])
    answer = predictor(prior, torch.zeros(2, 32).double(), torch.zeros(2, 8, 32).double(), mask, 2)
    for t in (9, 3):
        answer(torch.zeros(4, 32).double(), torch.tensor(t))
    hook.remove()
    usual = getattr(prior, "prd_embedding", None) is not None
    assert tokens == ([6, 3, 3] if usual else [11, 11])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", ["ours", "stock with norms"])
def test_packed_layers_answer_alike_and_leave_the_prior_as_it_was(name, dtype, tolerance):
    prior = attention.install(randomise(PRIORS[name]())).to(dtype)
    before = {k: (v.data_ptr(), v.clone()) for k, v in prior.state_dict().items()}
    text, encodings = torch.randn(2, 32, dtype=dtype), torch.randn(2, 8, 32, dtype=dtype)
    mask = torch.arange(8) < torch.tensor([[3], [6]])
    noised = torch.randn(2, 32, dtype=dtype)
    with torch.no_grad():
        answer = predictor(prior, text, encodings, mask)
        found = answer(noised, torch.tensor(400))
        expected = prior(noised, torch.tensor(400), text, encodings, mask).predicted_image_embedding
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert all(v.data_ptr() == before[k][0] and torch.equal(v, before[k][1]) for k, v in prior.state_dict().items())


def test_only_plain_layers_with_few_rows_are_packed():
    block = randomise(DiffusionPrior(**SHAPE, width=32, layers=1, head_dim=16)).blocks[0]
    with torch.no_grad():
        light = packed(block, 6)
        assert isinstance(light.attention.qkv, PackedLinear) and light.norm_mlp.weight is block.norm_mlp.weight
        assert not any(isinstance(m, PackedLinear) for m in block.modules())
        assert packed(block, 1000) is block and packed(copy.deepcopy(block).double(), 6).attention.qkv.weight is not None
        adapted = copy.deepcopy(block)
        adapted.mlp[0] = LoraLinear(adapted.mlp[0], "style", LoraConfig(r=2), r=2)
        assert packed(adapted, 6) is adapted
    assert packed(block, 6) is block, "where a gradient is wanted"


def test_a_torch_without_onednn_packs_nothing(monkeypatch):
    """As on a Mac: there it has none of these operations, not even the question of what they can do."""
    block = randomise(DiffusionPrior(**SHAPE, width=32, layers=1, head_dim=16)).blocks[0]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with torch.no_grad():
        assert packed(block, 6) is block


def test_a_cpu_that_cannot_multiply_bfloat16_packs_none_of_it(monkeypatch):
    """oneDNN refuses the layout there, with an error."""
    block = randomise(DiffusionPrior(**SHAPE, width=32, layers=1, head_dim=16)).blocks[0]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with torch.no_grad():
        assert packed(block, 6) is not block
        short = block.to(torch.bfloat16)
        assert packed(short, 6) is short
