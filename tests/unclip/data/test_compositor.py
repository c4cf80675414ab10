"""Batches of scenes composed on a device: what `compose_sprites` makes of each of them alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unclip.data.compositor import Layers, compose
from unclip.data.render import Layer, compose_sprites, hue_rotation
from unclip.data.scenes import IconSet, SceneSampler

Scenes = Sequence[tuple[Sequence[Layer], tuple[int, int, int]]]  # layers and ground of each

dense = torch.compile(compose, backend="eager", fullgraph=True, dynamic=True)  # the way of a GPU and of compiled graphs
both_ways = pytest.mark.parametrize("composer", [compose, dense], ids=["few", "dense"])


@pytest.fixture(scope="module")
def icons() -> IconSet:
    return IconSet.load("shapes")


def batch(scenes: Scenes) -> tuple[Layers, Tensor]:
    return Layers.of([layers for layers, _ in scenes]), torch.tensor([ground for _, ground in scenes])


def check(composer: Callable, sprites: np.ndarray, scenes: Scenes, size: int = 64) -> None:
    """Raises AssertionError where a pixel is off by more than 1 of 255, which is where fp32 rounds a tie the other way."""
    wanted = np.stack([compose_sprites(layers, sprites, size, ground) for layers, ground in scenes])
    found = composer(torch.from_numpy(np.ascontiguousarray(sprites)), *batch(scenes), size)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert (found.permute(0, 2, 3, 1).short() - torch.from_numpy(wanted).short()).abs().max() <= 1


def sampled(icons: IconSet, split: str, seed: int, count: int) -> Scenes:
    sampler = SceneSampler(icons, split, seed)
    return [(scene.layers, scene.background) for scene in map(sampler.scene, range(count))]


@both_ways
def test_scenes_of_every_kind_are_those_of_the_renderer(icons, composer):
    scenes = sampled(icons, "train", 0, 300)
    assert {len(layers) for layers, _ in scenes} == {1, 2, 3, 4, 5}
    assert any(layer.matrix for layers, _ in scenes for layer in layers)
    check(composer, icons.sprites, scenes)


layers = st.builds(
    Layer,
    icon=st.integers(0, 103),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
    size=st.floats(0.1, 1.5),
    matrix=st.one_of(st.none(), st.builds(hue_rotation, st.floats(0, 360), st.floats(0.5, 1.6))),
)
scenes = st.tuples(st.lists(layers, max_size=3), st.tuples(*[st.integers(0, 255)] * 3))


@settings(max_examples=50)
@given(scenes=st.lists(scenes, min_size=1, max_size=4).filter(lambda s: any(layers for layers, _ in s)))
def test_layers_that_overlap_and_leave_the_image_are_cut_alike(icons, scenes):
    check(compose, icons.sprites, scenes)


@both_ways
@pytest.mark.parametrize("size", [32, 96])
def test_images_of_other_sizes(icons, composer, size):
    check(composer, icons.sprites, sampled(icons, "train", 1, 32), size)


def test_padding_and_neighbours_change_nothing(icons):
    sprites = torch.from_numpy(icons.sprites)
    layers, grounds = batch(sampled(icons, "all", 2, 40))
    whole = dense(sprites, layers, grounds)
    counts = (layers.icons >= 0).sum(1)
    for number, count in enumerate(counts.tolist()):
        alone = compose(sprites, layers[number : number + 1, :count], grounds[number : number + 1])
        assert (alone[0].short() - whole[number].short()).abs().max() <= 1


def test_no_layer_leaves_the_ground():
    nothing = Layers(torch.full((2, 1), -1), *torch.full((3, 2, 1), 0.5))
    images = compose(torch.full((1, 64, 64, 4), 255, dtype=torch.uint8), nothing, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert images.flatten(2).unique(dim=2)[..., 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_nothing_is_read_back_to_the_host(icons):
    layers, grounds = batch(sampled(icons, "train", 3, 8))
    meta = Layers(*(t.to("meta") for t in vars(layers).values()))
    assert compose(torch.from_numpy(icons.sprites).to("meta"), meta, grounds.to("meta")).is_meta  # it has no values


def test_training_in_16_bits_does_not_reach_it(icons):
    scenes = sampled(icons, "train", 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        check(compose, icons.sprites, scenes)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["shapes", "data/emoji"])
def test_ten_thousand_scenes_are_those_of_the_renderer(path):
    if path != "shapes" and not Path(path, "icons.json.gz").exists():
        pytest.skip("built by `unclip data emoji`")
    icons = IconSet.load(path)
    scenes = sampled(icons, "train", 5, 10_000)
    rows = sorted({layer.icon for layers, _ in scenes for layer in layers})
    number = {row: n for n, row in enumerate(rows)}
    moved = [
        ([Layer(number[layer.icon], layer.x, layer.y, layer.size, layer.matrix) for layer in layers], ground)
        for layers, ground in scenes
    ]
    sprites = np.asarray(icons.sprites[rows])
    for start in range(0, len(moved), 500):
        check(compose, sprites, moved[start : start + 500])
        check(dense, sprites, moved[start : start + 500])


@pytest.mark.gpu
def test_a_gpu_composes_the_same(icons, exact):
    scenes = sampled(icons, "train", 6, 512)
    layers, grounds = batch(scenes)
    moved = Layers(*(t.cuda() for t in vars(layers).values()))
    sprites = torch.from_numpy(icons.sprites)
    for composer in (compose, torch.compile(compose, fullgraph=True)):
        found = composer(sprites.cuda(), moved, grounds.cuda()).cpu()
        assert (found.short() - compose(sprites, layers, grounds).short()).abs().max() <= 1
