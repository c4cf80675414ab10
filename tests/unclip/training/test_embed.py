"""The cache of CLIP's embeddings: what it saves, what it refuses, and that training from it is training without it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_networks
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

from unclip.clip.model import CLIP
from unclip.data.embeddings import EmbeddingCache
from unclip.data.image_files import read_captioned_images
from unclip.runtime.config import ConfigError
from unclip.training.objectives import create
from unclip.training.objectives.frozen_clip import FrozenCLIP

COUNT = 22
PRIOR = {"embedding_dim": 32, "num_embeddings": 16, "width": 32, "layers": 1, "head_dim": 16}
DECODER = {"channels": [16], "blocks": [1], "attention": [True], "head_dim": 16}
DECODER |= {"cross_attention_dim": 32, "time_embed_dim": 32}
STAGES = {
    "prior": (PRIOR, {"whitening_examples": 128}),
    "prior_autoregressive": (PRIOR | {"components": 8, "buckets": 8, "dot_buckets": 4}, {"fit_examples": 128}),
    "decoder": (DECODER, {}),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Captioned images of which one cannot be opened."""
    folder = tmp_path_factory.mktemp("images")
    for n in range(COUNT):
        pixels = np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02d}.png")
        (folder / f"{n:02d}.txt").write_text(f"thing number {n}" + " indeed" * (n % 4))
    (folder / "07.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def cache(images, tiny_folder, tmp_path_factory):
    from unclip.training.embed import embed

    out = tmp_path_factory.mktemp("cache") / "embeddings"
    unreadable = embed(FrozenCLIP.load(str(tiny_folder)), read_captioned_images(images), out, rows=8, batch=3, dtype="fp32")
    assert len(unreadable) == 1 and "07.png" in unreadable[0]
    return out


def objective(stage: str, images, clip, **data):
    torch.manual_seed(0)
    model, settings = STAGES[stage]
    section = {"model": model, "data": {"path": str(images), **data}, "objective": settings | {"clip": str(clip)}}
    return create(stage, section, seed=0)


@pytest.mark.parametrize("stage", STAGES)
def test_training_from_the_cache_has_the_losses_of_training_without_it(stage, images, cache, tiny_folder):
    answers = []
    for data in ({}, {"embeddings": str(cache)}):
        made = objective(stage, images, tiny_folder, **data)
        made.prepare()
        randomise(made.trained)
        batches = [default_collate([made.examples[i] for i in range(n, n + 8)]) for n in (0, 8, 16)]
        assert ("image" in batches[0]) == (not data or stage == "decoder")
        answers.append(torch.stack([made(batch)[0] for batch in batches]))
    assert all(np.isfinite(v) for v in made.validate().values())  # from the cache, without CLIP's towers
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-6)


def test_images_that_do_not_open_are_named_up_to_a_limit(images, tiny_folder, tmp_path, command):
    words = ("embed", images, tmp_path / "out", "--model", tiny_folder)
    code, _, said = command(*words, "--max-unreadable", "0")
    assert code == 2 and "1 pictures could not be read, the last: " in said and "07.png" in said
    code, out, said = command(*words, "--max-unreadable", "1")
    assert code == 0 and out == f"{tmp_path / 'out'}\n" and "left out: " in said and "07.png" in said


def test_it_goes_on_after_a_kill_and_changes_nothing_that_is_whole(images, cache, tiny_folder, tmp_path, command):
    out = tmp_path / "again"
    words = ["embed", images, out, "--model", tiny_folder, "--shard", "8", "--batch-size", "5", "--dtype", "fp32"]
    assert command(*words)[0] == 0
    whole = {p.name: load_file(p) for p in out.glob("*.safetensors")}
    kept = out / "shard-00000.safetensors"
    touched = kept.stat().st_mtime_ns
    (out / "shard-00001.safetensors").rename(out / "shard-00001.partial")  # killed while it wrote this one
    with pytest.raises(ConfigError, match=r"is not complete: 2 of 3 shards; the same `unclip embed` goes on with it"):
        EmbeddingCache(out)
    code, said, _ = command(*words)
    assert code == 0 and said.strip() == str(out)
    assert kept.stat().st_mtime_ns == touched
    for name, tensors in whole.items():
        again = load_file(out / name)
        assert all(torch.equal(again[k], v) for k, v in tensors.items())
    EmbeddingCache(out)
    other = load_file(cache / "shard-00001.safetensors")  # of another batch size
    for name, tensor in load_file(out / "shard-00001.safetensors").items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_half_precision_is_near(images, cache, tiny_folder, tmp_path, command):
    assert command("embed", images, tmp_path / "half", "--model", tiny_folder)[0] == 0
    full, half = EmbeddingCache(cache), EmbeddingCache(tmp_path / "half")
    for row in (0, 9, COUNT - 1):
        for name, tensor in full[row].items():
            assert half[row][name].shape == tensor.shape
            torch.testing.assert_close(half[row][name], tensor, rtol=2e-3, atol=2e-3)
    assert not full.readable(7) and full.readable(8)


def test_what_does_not_fit_is_refused(images, cache, tiny_folder, tmp_path, command):
    other = CLIP(*(tiny_networks()[n] for n in ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")))
    randomise(other.text_encoder, seed=9)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"was made with the CLIP {EmbeddingCache(cache).fingerprint}, but objective.clip"):
        objective("prior", images, tmp_path / "other", embeddings=str(cache))
    code, _, said = command("embed", images, cache, "--model", tmp_path / "other", "--shard", "8", "--dtype", "fp32")
    assert code == 2 and "holds another CLIP's embeddings" in said and "--force" in said
    with pytest.raises(ConfigError, match=r"was made of images of 64 px, but data.size is 32"):
        objective("decoder", images, tiny_folder, embeddings=str(cache), size=32)
    (tmp_path / "few").mkdir()
    for name in ("01.png", "01.txt"):
        (tmp_path / "few" / name).write_bytes((images / name).read_bytes())
    with pytest.raises(ConfigError, match="was made of other images or captions than data.path has"):
        objective("prior", tmp_path / "few", tiny_folder, embeddings=str(cache))
    with pytest.raises(ConfigError, match=r"holds no embeddings: embeddings.json is missing"):
        objective("prior", images, tiny_folder, embeddings=str(tmp_path))
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    shard = damaged / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is truncated or damaged"):
        objective("prior", images, tiny_folder, embeddings=str(damaged))
    (damaged / "embeddings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"embeddings.json is damaged; `unclip embed --force` writes it again"):
        objective("prior", images, tiny_folder, embeddings=str(damaged))
    words = ("embed", images, damaged, "--model", tiny_folder)
    code, _, said = command(*words)
    assert code == 2 and "embeddings.json is damaged; pass --force" in said
    assert command(*words, "--force")[0] == 0
    EmbeddingCache(damaged)
    with pytest.raises(ConfigError, match="shapes is composed anew for every example"):
        objective("prior", "shapes", tiny_folder, embeddings=str(cache))
    code, _, said = command("embed", images, images, "--model", tiny_folder)
    assert code == 2 and "is not empty and holds no embeddings" in said
    assert json.loads((cache / "embeddings.json").read_text())["count"] == COUNT
