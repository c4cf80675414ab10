"""Folders that cannot be used say so in one line that names the file."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from unclip import CLIP, UnCLIPPipeline
from unclip.io.checkpoints import check_folder, checkpoints, load_checkpoint, save_checkpoint, save_tensors


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_a_truncated_file_is_named(copy):
    path = copy / "decoder" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"decoder/diffusion_pytorch_model.safetensors is truncated"):
        UnCLIPPipeline.from_pretrained(copy)


def test_missing_files_are_named(copy):
    (copy / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="prior holds no weights"):
        UnCLIPPipeline.from_pretrained(copy)
    shutil.rmtree(copy / "prior")
    with pytest.raises(ValueError, match="lacks the folder prior/"):
        UnCLIPPipeline.from_pretrained(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(ValueError, match="model_index.json is missing"):
        UnCLIPPipeline.from_pretrained(copy)


def test_a_missing_scheduler_is_named(copy):
    (copy / "prior_scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="prior_scheduler"):
        UnCLIPPipeline.from_pretrained(copy)


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt"])
def test_a_pickle_is_refused_and_not_read(copy, suffix, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (copy / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Bomb()}, copy / "prior" / f"diffusion_pytorch_model.{suffix}")
    with pytest.raises(ValueError, match=rf"diffusion_pytorch_model.{suffix} is a pickle"):
        UnCLIPPipeline.from_pretrained(copy)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["nonsense", "no/such/folder", "./nowhere"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(ValueError, match="unknown model"):
        UnCLIPPipeline.from_pretrained(name)


def test_a_hub_id_offline_is_one_line():
    with pytest.raises(ValueError, match="'someone/somemodel' is no folder .* the Hub cannot be reached") as caught:
        UnCLIPPipeline.from_pretrained("someone/somemodel")
    assert "\n" not in str(caught.value)


def test_a_component_of_another_width_is_refused_by_the_index(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["image_encoder"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no image_encoder"):
        CLIP.from_pretrained(copy)
    check_folder(copy)


@pytest.mark.parametrize("part", ["decoder", "prior", "text_encoder", "text_proj"])
def test_weights_that_a_file_lacks_are_named(copy, part):
    path = copy / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    lost = sorted(n for n in tensors if n.endswith("weight"))[0]
    save_file({n: t for n, t in tensors.items() if n != lost}, path)
    with pytest.raises(ValueError, match=rf"{part}/.*safetensors lacks {re.escape(lost)}$"):
        UnCLIPPipeline.from_pretrained(copy)


def test_a_tokenizer_without_words_is_refused(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer holds no vocabulary"):
        UnCLIPPipeline.from_pretrained(copy)


@pytest.mark.parametrize("content", ["[]", "null", '{"prior": '])
def test_an_index_or_a_configuration_that_is_none_is_named(copy, content):
    for file in ("prior_scheduler/scheduler_config.json", "decoder/config.json", "model_index.json"):
        (copy / file).write_text(content)
        with pytest.raises(ValueError, match=rf"{file} is no(t valid JSON| JSON object)"):
            UnCLIPPipeline.from_pretrained(copy)


def test_an_upsampler_needs_its_scheduler(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"upsampler_1024_scheduler": [None, None]}))
    with pytest.raises(ValueError, match="upsampler_1024 needs an upsampler_1024_scheduler"):
        UnCLIPPipeline.from_pretrained(copy)


def test_checkpoints_are_whole_or_not_there(tmp_path):
    tensors = {"weights": {"a": torch.arange(4.0)}, "ema": {"a": torch.ones(4)}}
    for step in (1, 2):
        save_checkpoint(tmp_path / f"checkpoint-{step:08d}", tensors, {"step": step})
    newest, older = checkpoints(tmp_path)
    loaded, state = load_checkpoint(newest)
    assert state == {"step": 2}
    assert torch.equal(loaded["weights"]["a"], tensors["weights"]["a"])
    (newest / "ema.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"ema.safetensors is truncated"):
        load_checkpoint(newest)
    assert load_checkpoint(older)[1] == {"step": 1}
    (tmp_path / "checkpoint-00000003.partial").mkdir()
    assert checkpoints(tmp_path) == [newest, older]


def test_whoever_may_read_the_configurations_may_read_the_weights(tiny_folder, tmp_path):
    """safetensors writes for the owner alone: a model exported by one of a group would be no use to the others."""
    save_checkpoint(tmp_path / "checkpoint-00000001", {"weights": {"a": torch.ones(2)}}, {"step": 1})
    for folder in (tiny_folder, tmp_path):
        files = {path.name: oct(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
        assert any(name.endswith(".safetensors") for name in files) and len(set(files.values())) == 1, files


def test_weights_follow_the_umask_of_the_moment(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
        (tmp_path / "b.json").touch()
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"a.safetensors": "0o640", "b.json": "0o640"}
