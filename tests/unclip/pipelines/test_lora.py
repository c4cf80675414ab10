"""Adapters on prior and decoder: loaded, scaled, mixed, unloaded; saved equals loaded."""

import pytest
import torch
from drawing import close, draw
from peft import LoraConfig

from unclip import UnCLIPPipeline

TARGETS = {"ours": ["qkv", "context_kv", "proj_in"], "stock": ["to_q", "to_v", "add_k_proj"]}


def adapt(pipe, seed: int, name: str) -> list[str]:
    """Give every network that can take one a random adapter; -> the networks' names."""
    g = torch.Generator().manual_seed(seed)
    networks = [n for n in ("prior", "decoder") if n in pipe.components]
    for network in networks:
        module = getattr(pipe, network)
        stock = type(module).__module__.startswith("diffusers")
        module.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS["stock" if stock else "ours"]), name)
        for key, parameter in module.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    return networks


def test_adapters_are_saved_loaded_scaled_and_unloaded(pipe, tmp_path):
    pipe.to(torch.float64)
    bare = draw(pipe)
    networks = adapt(pipe, 1, "default")
    tuned = draw(pipe)
    assert (tuned - bare).abs().max() > 1e-3
    pipe.save_lora_weights(tmp_path / "lora")
    pipe.unload_lora_weights()
    close(draw(pipe), bare)
    for source in (tmp_path / "lora", str(tmp_path / "lora" / "pytorch_lora_weights.safetensors")):
        pipe.load_lora_weights(source, adapter_name="style")
        close(draw(pipe), tuned)
        assert pipe.get_list_adapters() == {n: ["style"] for n in networks}
        pipe.set_adapters("style", 0.0)
        close(draw(pipe), bare)
        pipe.set_adapters(["style"], [1.0])
        close(draw(pipe), tuned)
        with pytest.raises(ValueError, match="named 'style' already"):
            pipe.load_lora_weights(source, adapter_name="style")
        pipe.unload_lora_weights()
        close(draw(pipe), bare)


def test_an_adapter_is_the_same_file_each_time(tiny, tmp_path):
    """A safetensors header with two entries of metadata has them in another order now and then."""
    adapt(tiny, 1, "default")
    for n in range(8):
        tiny.save_lora_weights(tmp_path / str(n))
    assert len({p.read_bytes() for p in tmp_path.glob("*/*.safetensors")}) == 1
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 8


def test_two_adapters_add_up(pipe):
    pipe.to(torch.float64)
    adapt(pipe, 1, "a")
    adapt(pipe, 2, "b")
    pipe.set_adapters(["a", "b"], [0.7, 0.4])
    both = draw(pipe)
    pipe.set_adapters(["b", "a"], [0.4, 0.7])
    close(draw(pipe), both)
    pipe.set_adapters("a", 0.7)
    assert (draw(pipe) - both).abs().max() > 1e-4


def test_what_is_no_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="it holds 'unet.lora_A'"):
        tiny.load_lora_weights({"unet.lora_A": torch.zeros(2)})
    with pytest.raises(ValueError, match="it holds 'nothing'"):
        tiny.load_lora_weights({})
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="x.bin is a pickle and is refused"):
        tiny.load_lora_weights(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="none.safetensors is not a file"):
        tiny.load_lora_weights(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="it holds 0"):
        tiny.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        tiny.save_lora_weights(tmp_path, "x")
    assert isinstance(tiny, UnCLIPPipeline)
