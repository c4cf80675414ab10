"""Weights in 8 bits."""

import hashlib

import pytest
import torch
from conftest import randomise, seeds, tiny_networks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from prior import DiffusionPrior
from prior.storage import SCALE, Int8Storage, dequantise, is_int8, quantise, read_weights, store_in_8_bits
from unclip import UnCLIPPipeline
from unclip.training.export import export_pipeline


@settings(max_examples=30)
@given(rows=st.integers(2, 9), width=st.integers(600, 5000), size=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
def test_an_error_is_at_most_half_a_scale_of_its_row(rows, width, size, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=g) * size * torch.logspace(0, 3, rows)[:, None]
    stored = quantise({"w": weight})
    back = dequantise(stored)["w"]
    if weight.numel() >= 4096:
        assert stored["w"].dtype == torch.int8
        assert ((back - weight).abs() <= stored["w" + SCALE][:, None] * 0.5001).all()
        again = quantise({"w": back})
        assert torch.equal(again["w"], stored["w"]), "quantised again it is the same"
    else:
        assert stored["w"].dtype == torch.float16


def test_small_tensors_vectors_and_integers_keep_their_values():
    state = {"bias": torch.randn(8000), "one": torch.randn(1, 9000), "small": torch.randn(8, 8), "count": torch.arange(9000)}
    stored = quantise(state)
    assert stored.keys() == state.keys()
    assert torch.equal(stored["count"], state["count"])
    assert all(torch.equal(stored[n], state[n].half()) for n in ("bias", "one", "small"))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A prior saved twice: as it is, and in 8 bits."""
    network = randomise(DiffusionPrior(embedding_dim=64, num_embeddings=8, width=128, layers=2, head_dim=64))
    folder = tmp_path_factory.mktemp("prior")
    for name in ("plain", "int8"):
        network.save_pretrained(folder / name)
    store_in_8_bits(folder / "int8" / "diffusion_pytorch_model.safetensors")
    return network, folder


def test_a_network_reads_either_and_takes_the_dtype_that_is_asked_for(prior):
    network, folder = prior
    plain, int8 = (DiffusionPrior.from_pretrained(folder / name) for name in ("plain", "int8"))
    assert (folder / "int8" / "diffusion_pytorch_model.safetensors").stat().st_size < 0.4 * (
        folder / "plain" / "diffusion_pytorch_model.safetensors"
    ).stat().st_size
    for name, weight in network.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight)
        torch.testing.assert_close(int8.state_dict()[name], weight, rtol=1e-3, atol=weight.abs().max().item() / 120)
    assert int8.dtype == torch.float32
    assert not int8.training
    for key in ("dtype", "torch_dtype"):
        assert DiffusionPrior.from_pretrained(folder / "int8", **{key: torch.float64}).dtype == torch.float64
    again = DiffusionPrior.from_pretrained(folder, subfolder="int8")
    assert all(torch.equal(weight, int8.state_dict()[name]) for name, weight in again.state_dict().items())


def test_a_pipeline_in_8_bits_draws_nearly_the_same_with_low_memory_too(tiny_folder, tmp_path):
    out = export_pipeline([tiny_folder], tmp_path / "int8", storage="int8")
    names = [n for n, c in tiny_networks().items() if isinstance(c, Int8Storage)]
    files = {name: next((out / name).glob("*.safetensors")) for name in names}
    assert len(files) >= 6
    assert all(is_int8(file) for file in files.values())
    images = []
    for folder, low_memory in ((tiny_folder, False), (out, False), (out, True)):
        pipe = UnCLIPPipeline.from_pretrained(folder, dtype=torch.float64, low_memory=low_memory)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe("a star", generator=seeds(1), size=64, output_type="pt").images)
    assert torch.equal(images[1], images[2])
    assert 0 < (images[0] - images[1]).abs().mean() < 0.02
    state = read_weights(files["decoder"])
    assert not any(name.endswith(SCALE) for name in state)
    assert any(name.endswith(SCALE) for name in load_file(files["decoder"]))


def test_exported_again_it_is_the_same(tiny_folder, tmp_path):
    once = export_pipeline([tiny_folder], tmp_path / "once", storage="int8")
    twice = export_pipeline([once], tmp_path / "twice", storage="int8")
    for file in once.glob("*/*.safetensors"):
        first, second = (load_file(f) for f in (file, twice / file.relative_to(once)))
        digests = [
            hashlib.sha256(b"".join(s[n].numpy().tobytes() for n in sorted(s) if s[n].dtype == torch.int8)).hexdigest()
            for s in (first, second)
        ]
        assert digests[0] == digests[1], file


def test_an_unknown_storage_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="storage must be fp16 or int8, got 'int4'"):
        export_pipeline([tiny_folder], tmp_path / "out", storage="int4")
