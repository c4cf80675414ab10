"""One attention function: its kernels agree, and every network goes through it."""

import time
from importlib.metadata import version

import karlo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior import DiffusionPrior
from prior.blocks import sdpa
from unclip import UnCLIPImageVariationPipeline
from unclip.runtime import attention as module
from unclip.runtime.attention import aligned_bias, attention, install, why_not


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    heads=st.integers(1, 3),
    masked=st.sampled_from(["no", "keys", "all", "added"]),
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
    if masked == "added":
        mask = torch.where(mask, 0.0, -10000.0).double() + torch.randn(mask.shape, generator=g, dtype=torch.float64)
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


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
    masked=st.sampled_from(["no", "keys", "heads", "all", "added"]),
    largest=st.sampled_from([0.1, 1.0, 1e4]),
    together=st.sampled_from([1, 60, 2**21]),
    seed=st.integers(0, 99),
)
def test_without_a_maximum_attention_is_the_same(sizes, masked, largest, together, seed):
    """In bfloat16, for scores small and large (there with one), for any mask, a few heads at a time."""
    batch, queries, keys, heads = sizes
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, 8, generator=g).bfloat16() for n in (queries, keys, keys))
    q, mask = q * largest, None
    if masked != "no":
        shapes = {"keys": (batch, 1, 1, keys), "heads": (1, heads, 1, keys)}
        mask = torch.rand(shapes.get(masked, (1, 1, queries, keys)), generator=g) > 0.4
        mask[..., 0] = True
    if masked == "added":
        mask = torch.where(mask[:, :, :1], 0.0, -10000.0).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_SCORES", together)
        patch.setattr(module, "MATH_QUERIES", 1)
        plain, answer = module._without_maximum(q, k, v, mask), attention(q, k, v, mask)
    exact = sdpa(q.double(), k.double(), v.double(), mask if mask is None or mask.dtype == torch.bool else mask.double())
    torch.testing.assert_close(answer.double(), exact, atol=0.06, rtol=0.06)
    assert (plain is None) == (largest == 1e4 or (masked == "all" and queries > 1))
    assert answer.shape == q.shape and answer.dtype == q.dtype


def test_a_query_that_may_attend_to_nothing_is_no_nan():
    q = torch.randn(1, 64, 2, 8).bfloat16()
    assert attention(q, q, q, torch.zeros(1, 1, 1, 64, dtype=torch.bool)).isfinite().all()


def test_a_compiled_network_takes_it_too():
    """As one step of the graph: which kernel it is depends on the scores."""
    q, k, v = torch.randn(3, 2, 64, 3, 8).bfloat16().unbind()
    function = torch.compile(lambda q, k, v, mask: attention(q * 1.5, k, v, mask), backend="aot_eager", fullgraph=True)
    mask = torch.rand(2, 1, 1, 64) > 0.5
    for scale in (0.1, 1e4):
        torch.testing.assert_close(function(q * scale, k, v, mask), attention(q * scale * 1.5, k, v, mask))


def test_installing_reaches_every_layer_and_unknown_names_are_refused():
    prior = DiffusionPrior(embedding_dim=32, num_embeddings=4, width=32, layers=2, head_dim=16)
    before = [b.attention.function for b in prior.blocks]
    install(prior, "math")
    assert all(b.attention.function is not f for b, f in zip(prior.blocks, before, strict=True))
    with pytest.raises(ValueError, match="'flash'"):
        install(prior, "flash")


def test_the_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(module, "_logged", set())
    caplog.set_level("INFO", "unclip.runtime.attention")
    prior = DiffusionPrior(embedding_dim=32, num_embeddings=4, width=32, layers=2, head_dim=16)
    for backend in ("auto", "sdpa", "auto", "sdpa"):
        install(prior, backend)
    auto, chosen = [r.getMessage() for r in caplog.records]
    assert chosen == "attention: sdpa"
    if not torch.cuda.is_available():
        assert auto == (
            "attention: math up to 1024 key tokens, sdpa above; not xformers, because it has no kernel for a CPU, "
            "and no CUDA device is available"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="possible here")
def test_an_impossible_kernel_says_why():
    with pytest.raises(ValueError, match="'xformers' cannot be used: it has no kernel for a CPU"):
        install(DiffusionPrior(embedding_dim=32, num_embeddings=4, width=32, layers=1, head_dim=16), "xformers")


def test_diffusers_networks_answer_as_with_their_own_processors(tmp_path, monkeypatch):
    """Self, causal and added keys and values, with padding; and every layer comes through the one function."""
    have = karlo.parts(tmp_path)
    g = torch.Generator().manual_seed(0)
    embeds, states = torch.randn(3, karlo.DIM, generator=g), torch.randn(3, karlo.TOKENS, karlo.DIM, generator=g)
    mask = torch.arange(karlo.TOKENS)[None] < torch.tensor([[1], [5], [12]])
    image, added = torch.randn(3, 3, 16, 16, generator=g), torch.randn(3, 32, generator=g)

    def answers() -> list[torch.Tensor]:
        return [
            have["prior"](embeds, 9, embeds, states, mask).predicted_image_embedding,
            have["decoder"](image, 9, states, class_labels=added, attention_mask=mask).sample,
        ]

    with torch.no_grad():
        before = answers()
        layers = sum(len(have[n].attn_processors) for n in ("prior", "decoder"))
        for backend in ("math", "sdpa"):
            for name in ("prior", "decoder"):
                install(have[name], backend)
            calls = []
            monkeypatch.setattr(module, "attention", lambda *a, calls=calls: (calls.append(a), attention(*a))[1])
            for old, new in zip(before, answers(), strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
            assert len(calls) == layers and {c[-1] for c in calls} == {backend}


def test_as_many_context_tokens_as_pixels(tmp_path):
    """diffusers' own processors forget to extend the mask over the pixels when both are equally many."""
    decoder = install(karlo.parts(tmp_path)["decoder"])
    states = torch.randn(2, 64, karlo.DIM, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(64)[None] < torch.tensor([[3], [64]])
    image, added = torch.randn(2, 3, 16, 16), torch.randn(2, 32)

    def draw(states, mask):
        return decoder(image, 9, states, class_labels=added, attention_mask=mask).sample

    with torch.no_grad():
        whole = draw(states, mask)
        wider = draw(*(torch.nn.functional.pad(t, p) for t, p in ((states, (0, 0, 0, 3)), (mask, (0, 3)))))
    torch.testing.assert_close(whole, wider, rtol=0, atol=1e-5)


def test_every_row_of_a_bias_is_aligned():
    for keys in (1, 7, 8, 81):
        query = torch.zeros(2, 5, 3, 16, dtype=torch.float16)
        bias = aligned_bias(torch.ones(2, 1, 1, keys, dtype=torch.bool), query, keys)
        assert bias.shape == (2, 3, 5, keys) and all(s % 8 == 0 for s in bias.stride()[:-1])


def test_xformers_front_end_agrees_with_the_reference(run):
    """Forward and backward through xformers itself, over a CPU kernel: what it refuses here, a GPU would refuse."""
    version("xformers")
    result = run("-c", "import xformers.ops, sys; sys.path.append('tests'); import xformers_on_cpu as x; x.main()")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == 48 + 5


def test_a_sibling_leaves_the_kernel_that_was_chosen(tiny, monkeypatch):
    tiny.set_attention("math")
    UnCLIPImageVariationPipeline.from_pipe(tiny)
    asked, real = set(), module.attention
    monkeypatch.setattr(module, "attention", lambda *given: asked.add(given[4]) or real(*given))
    tiny("a star", size=64, generator=torch.Generator().manual_seed(0))
    assert asked == {"math"}


def test_kernels_that_were_built_for_another_torch_are_logged_of_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("xformers._cpp_lib._built_with_cuda", True)
    assert why_not("xformers") is None
    monkeypatch.setattr("xformers._cpp_lib._built_with_cuda", False)
    with pytest.raises(ValueError, match=r"'xformers' cannot be used: its kernels were not built for torch .*; install the"):
        install(DiffusionPrior(embedding_dim=32, num_embeddings=4, width=32, layers=1, head_dim=16), "xformers")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["xformers", "sdpa", "math"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_real_kernels_agree_and_tell_their_speed(dtype, backend):
    if reason := why_not(backend):
        pytest.skip(reason)
    g = torch.Generator("cuda").manual_seed(0)
    for queries, keys in ((81, 81), (1024, 1109), (256, 341), (64, 149)):
        shapes = ((8, queries, 12, 64), (8, keys, 12, 64), (8, keys, 12, 64))
        query, key, value = (torch.randn(s, generator=g, device="cuda", dtype=dtype) for s in shapes)
        mask = torch.arange(keys, device="cuda")[None, None, None] < torch.randint(1, keys, (8, 1, 1, 1), device="cuda")
        expected = attention(query.double(), key.double(), value.double(), mask, "math")
        out = attention(query, key, value, mask, backend)
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 3e-3}[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(20):
            attention(query, key, value, mask, backend)
        torch.cuda.synchronize()
        took, peak = (time.perf_counter() - start) / 20, torch.cuda.max_memory_allocated() / 2**20
        print(f"{backend} {dtype} {queries} to {keys}: {1e3 * took:.3f} ms, peak {peak:.0f} MiB")


def test_the_command_line_does_not_pass_on_that_xformers_has_no_gpu(run):
    """It is installed with the tests; diffusers imports it, and without a GPU it would print a warning."""
    version("xformers")
    code = "import sys, unclip.pipelines, unclip.cli; assert sys.modules['xformers'] is not None"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    warned = "XFORMERS" in result.stderr
    result = run("-m", "unclip", "generate", "a star", "--model", "no such model")
    assert result.returncode == 2 and "XFORMERS" not in result.stderr and "xformers" not in result.stderr
    assert warned or torch.cuda.is_available()


def test_diffusers_may_be_imported_first(run):
    """As whoever comes from it does; it has noted by then that xformers is installed."""
    code = (
        "from diffusers import DPMSolverMultistepScheduler; from unclip import UnCLIPPipeline; print(UnCLIPPipeline.__name__)"
    )
    result = run("-c", code)
    assert result.returncode == 0 and result.stdout.strip() == "UnCLIPPipeline", result.stderr
