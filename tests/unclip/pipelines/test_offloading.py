"""Weights that come to a device when they are needed and leave when they are not, by diffusers' own means, without a GPU."""

import pytest
import torch
from conftest import TINY_DEFAULTS, randomise, tiny_networks
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from drawing import close, draw
from pretend_device import DEVICE, PretendDevice

from prior import AutoregressivePrior
from unclip import UnCLIPPipeline

SIZES = {"embedding_dim": 32, "num_embeddings": 16, "components": 6, "buckets": 8, "dot_buckets": 4, "width": 32, "layers": 1}


def made(networks: dict) -> UnCLIPPipeline:
    pipe = UnCLIPPipeline(**networks, defaults=TINY_DEFAULTS).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_autoregressive_prior() -> UnCLIPPipeline:
    torch.manual_seed(0)
    prior = randomise(AutoregressivePrior(**SIZES, head_dim=16), scale=0.3)
    return made(tiny_networks() | {"prior": prior, "prior_scheduler": None})


def networks(pipe) -> dict[str, torch.nn.Module]:
    return {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


@pytest.fixture
def device(monkeypatch):
    """The pretend device, with what torch would have for one that it knows."""
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # a module's parameters change kind
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.empty_device_cache", lambda kind: None)
    with PretendDevice():
        yield DEVICE


def there(pipe) -> set[str]:
    """The networks whose weights are on the device."""
    return {n for n, c in networks(pipe).items() if next(c.parameters()).device.type == DEVICE.type}


@pytest.mark.parametrize("kind", ["diffusion", "none", "autoregressive"])
def test_model_offload_draws_the_same_with_the_working_stage_on_the_device(kind, device):
    pipe = with_autoregressive_prior() if kind == "autoregressive" else made(tiny_networks())
    expected = draw(pipe, size=64, prior=kind)
    seen = {}

    def note(which, step, timestep, given):
        seen.setdefault(which.stage, there(which))

    pipe.enable_model_cpu_offload(device=device)
    for _ in range(2):
        drawn = draw(pipe, size=64, prior=kind, callback_on_step_end=note)
        assert drawn.device == device and there(pipe) == set()
        close(drawn.cpu(), expected, 1e-5)
    assert seen == {stage: {stage} for stage in (["decoder"] if kind == "none" else ["prior", "decoder"])}


@pytest.mark.parametrize("kind", ["diffusion", "none", "autoregressive"])
def test_sequential_offload_draws_the_same(kind):
    """With the CPU for a device: what is not at work is on the meta device, where it holds nothing."""
    pipe = with_autoregressive_prior() if kind == "autoregressive" else made(tiny_networks())
    expected = draw(pipe, size=64, prior=kind)
    pipe.enable_sequential_cpu_offload(device="cpu")
    for module in [m for network in networks(pipe).values() for m in network.modules() if hasattr(m, "_hf_hook")]:
        for hook in getattr(module._hf_hook, "hooks", [module._hf_hook]):
            hook.execution_device = torch.device("cpu")  # not cpu:0, which for torch is another one
    close(draw(pipe, size=64, prior=kind), expected, 1e-4)
    away = {n for n, c in networks(pipe).items() if all(p.is_meta for p in c.parameters())}
    assert away == set(networks(pipe)) - {"prior"}


@pytest.mark.parametrize("kind", ["diffusion", "none", "autoregressive"])
def test_group_offload_draws_the_same(kind, tmp_path):
    """With the CPU for a device and the disk for a place to be away in: what is there holds nothing in memory."""
    pipe = with_autoregressive_prior() if kind == "autoregressive" else made(tiny_networks())
    expected = draw(pipe, size=64, prior=kind)
    for name, network in networks(pipe).items():
        network.to(memory_format=torch.contiguous_format)  # as safetensors wants them
        away = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path / name)}
        apply_group_offloading(network, torch.device("cpu"), **away)
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.data.zero_()  # were it read as it is, the image would be another
    for _ in range(2):
        close(draw(pipe, size=64, prior=kind), expected, 1e-5)


def test_group_offload_goes_by_single_layers():
    pipe = made(tiny_networks())
    with pytest.raises(
        ValueError, match="offload_type 'block_level' does not fit decoder, super_res_first, upsampler_1024: take"
    ):
        pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    expected = draw(pipe)
    pipe.enable_group_offload("cpu")
    assert all(_is_group_offload_enabled(network) for network in networks(pipe).values())
    close(draw(pipe), expected, 1e-5)
