"""The search for the most similar render: all its errors are those of images that were really moved, and it finds the icon."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unclip.data.icons import IconSet
from unclip.data.render import Layer, compose_sprites
from unclip.evaluation.alignment import SCALES, SHIFT, nearest_icon, shift, shifted_errors
from unclip.evaluation.metrics import psnr
from unclip.evaluation.poses import POSE, in_pose, jittered, render_layers


@pytest.fixture(scope="module")
def icons() -> IconSet:
    return IconSet.load("shapes")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.booleans(), st.booleans())
def test_every_error_is_that_of_the_moved_image(seed, coloured, masked):
    image, candidates = noise(3, 16, 16, seed=seed), noise(2, 3, 16, 16, seed=seed + 1)
    ground = torch.tensor([51, 102, 204]) / 255 if coloured else None
    inside = noise(16, 16, seed=seed + 2) > 128 if masked else None
    errors = shifted_errors(image, candidates, ground, inside)
    assert errors.shape == (2, 2 * SHIFT + 1, 2 * SHIFT + 1)
    for k in range(2):
        for down in range(-SHIFT, SHIFT + 1):
            for across in range(-SHIFT, SHIFT + 1):
                off = (image.double() - shift(candidates[k], down, across, ground).double()).div(255).square()
                expected = off.mean() if inside is None else off[:, inside].mean()
                assert errors[k, down + SHIFT, across + SHIFT].item() == pytest.approx(expected.item(), abs=2e-6)


def test_a_shift_brings_the_ground_in_and_loses_what_leaves():
    image = noise(3, 16, 16)
    there = shift(image, 3, -2)
    assert torch.equal(there[:, 3:, :-2], image[:, :-3, 2:])
    assert (there[:, :3] == 255).all() and (there[:, :, -2:] == 255).all()
    assert torch.equal(shift(there, -3, 2)[:, :-3, 2:], image[:, :-3, 2:])


def test_an_icon_is_found_at_another_size_and_place(icons):
    rows = [0, 4 * 5 + 1, 4 * 16 + 2]
    images = torch.stack([shift(in_pose(icons, [row], SCALES[2])[0], 4, -3) for row in rows])
    match = nearest_icon(images, icons, [[3, 21, 66, 40, row] for row in rows])
    assert match.rows.tolist() == rows
    assert torch.equal(match.renders, images) and (match.psnr >= 99).all()


def test_the_found_render_is_what_its_psnr_is_of(icons):
    images = jittered(icons, [8, 40], seed=1)
    match = nearest_icon(images, icons, [[8, 9], [41, 42, 43]])
    assert torch.allclose(match.psnr, psnr(images.float() / 255, match.renders.float() / 255), atol=1e-3)
    assert match.rows[0] == 8 and match.rows[1] in (41, 42, 43)
    assert match.psnr[0] > 18 > match.psnr[1]  # other palettes are other colours


def test_renders_are_those_of_scenes(icons):
    layer = Layer(7, 0.52, 0.49, 0.87)
    render = compose_sprites([layer], icons.sprites, 64)
    assert np.array_equal(render_layers(icons, [layer])[0].permute(1, 2, 0).numpy(), render)
    assert torch.equal(in_pose(icons, [7]), render_layers(icons, [Layer(7, *POSE)]))
    assert torch.equal(jittered(icons, [7, 8], 3), jittered(icons, [7, 8], 3))
    assert not torch.equal(jittered(icons, [7], 3), jittered(icons, [7], 4))
