"""Many drawn, the best kept: which they are doesn't depend on how many are drawn at a time."""

import pytest
import torch
from conftest import seeds
from PIL import Image

from unclip.clip.model import CLIP
from unclip.pipelines.rerank import rerank


def test_the_best_are_the_best_in_batches_of_any_size(tiny):
    tiny.to(torch.float64)
    found = [rerank(tiny, "a star", 7, 3, seed=5, batch=b, decoder_num_inference_steps=2) for b in (7, 3, 1)]
    for other in found[1:]:
        assert [s for _, s in other] == [s for _, s in found[0]]
    drawn = tiny(["a star"] * 7, generator=seeds(*range(5, 12)), size=64, output_type="pt", decoder_num_inference_steps=2)
    clip = CLIP(tiny.text_encoder, tiny.tokenizer, tiny.image_encoder, tiny.feature_extractor)
    scores = clip.encode_image(drawn.images.float()) @ clip.encode_text("a star")[0]
    order = scores.argsort(descending=True)[:3]
    assert [s for _, s in found[0]] == (order + 5).tolist()
    torch.testing.assert_close(torch.tensor([s for s, _ in found[0]]), scores[order].float(), rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_the_candidates(tiny):
    sizes = []
    tiny.decoder.register_forward_hook(lambda *a: sizes.append(len(a[-1].sample)))
    rerank(tiny, "a star", 9, 1, batch=2, decoder_num_inference_steps=1)
    assert max(sizes) == 4  # two images, guided


def test_the_command(command, tiny_folder, tmp_path):
    words = ["rerank", "a star", "--candidates", "5", "--keep", "2", "--size", "64", "--steps", "2", "--model", tiny_folder]
    code, said, _ = command(*words, "--out", tmp_path / "best")
    files = [tmp_path / "best" / f"{n:03d}.png" for n in (1, 2)]
    assert code == 0 and said.split() == [str(f) for f in files]
    scores = [float(Image.open(f).text["score"]) for f in files]
    assert scores[0] >= scores[1]
    for more, message in ((["--keep", "6"], "got 6"), (["--candidates", "0"], "got 0")):
        code, said, error = command(*words, *more, "--out", tmp_path / "other")
        assert code == 2 and said == "" and message in error
    assert not (tmp_path / "other").exists()


def test_no_image_tower_no_ranking(tiny):
    tiny.image_encoder = None
    with pytest.raises(ValueError, match="no image_encoder and feature_extractor to rank with"):
        rerank(tiny, "a star", 2, 1)
