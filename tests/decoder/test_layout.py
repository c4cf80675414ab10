"""The layout predictor, and drafts composed of several objects."""

import pytest
import torch
from conftest import randomise

from decoder import UnCLIPTextProjModel
from decoder.layout import POSE_SIZE, LayoutPredictor, compose_drafts
from unclip.data.icons import IconSet
from unclip.data.scenes import SceneSampler

SIZES = {"clip_embeddings_dim": 12, "time_embed_dim": 32, "cross_attention_dim": 32, "text_layers": 1, "text_head_dim": 16}
LAYOUT = {"draft": {"size": 8, "width": 16, "layers": 1, "opacity": True}, "layout": {"slots": 3, "width": 64, "layers": 1}}


@pytest.fixture(scope="module")
def project() -> UnCLIPTextProjModel:
    return randomise(UnCLIPTextProjModel(**SIZES, **LAYOUT, text_images=True, styles=["flat", "3d"])).double()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_composed_true_drafts_are_the_scene():
    """Icons as a perfect head would draft them, put in the places of a scene's layers, give the scene."""
    icons = IconSet.load("shapes")
    sampler = SceneSampler(icons, "train", kinds=["relation", "count", "background", "size", "single"], single_pose=True)
    scenes = [s for s in map(sampler.scene, range(60)) if all(layer.matrix is None for layer in s.layers)]
    assert {len(s.layers) for s in scenes} >= {1, 2, 5}
    for scene in scenes:
        drafts = icons.in_pose([layer.icon for layer in scene.layers], opacity=True)
        drafts[:, :3] = drafts[:, :3] * 2 - 1
        boxes = torch.tensor([[layer.x, layer.y, layer.size] for layer in scene.layers])
        background = torch.tensor(scene.background) / 127.5 - 1
        image = compose_drafts(drafts[None], boxes[None], torch.ones(1, len(boxes)) > 0, background[None], 64)[0]
        real = torch.from_numpy(icons.pixels(scene)).permute(2, 0, 1) / 127.5 - 1
        assert (image - real).abs().mean() < 0.03, scene.caption
        assert (image - real).square().mean() < 0.05 * (real - background[:, None, None]).square().mean(), scene.caption


def test_slots_that_are_not_used_leave_the_background():
    drafts, boxes = normal(2, 3, 4, 8, 8), torch.full((2, 3, 3), 0.5, dtype=torch.float64)
    background = normal(2, 3)
    image = compose_drafts(drafts, boxes, torch.zeros(2, 3) > 0, background, 16)
    assert torch.equal(image, background[..., None, None].expand(-1, -1, 16, 16))


def test_an_object_in_the_heads_pose_on_white_is_its_draft():
    drafts = normal(1, 1, 4, 16, 16)
    boxes = torch.tensor([[[0.5, 0.5, POSE_SIZE]]], dtype=torch.float64)
    image = compose_drafts(drafts, boxes, torch.ones(1, 1) > 0, torch.ones(1, 3, dtype=torch.float64), 16)
    torch.testing.assert_close(image, drafts[:, 0, :3], atol=1e-5, rtol=1e-5)


def test_padding_and_the_batch_do_not_matter():
    predictor = randomise(LayoutPredictor(24, slots=3, width=64, layers=2)).double()
    text = normal(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    both, alone = predictor(text, mask), predictor(text[1:, :3])
    for name in ("is_single", "present", "boxes", "background"):
        torch.testing.assert_close(getattr(both, name)[1:], getattr(alone, name))
    torch.testing.assert_close(both.tokens[1:, :, :3], alone.tokens)
    assert both.tokens[1, :, 3:].abs().max() == 0
    torch.testing.assert_close(both.tokens.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_the_draft_of_one_object_alone_is_that_of_the_image_embedding(project):
    embeds, encodings = normal(2, 12), normal(2, 5, 12, seed=1)
    style = torch.tensor([0, 1])
    alone = project.draft_image(embeds, style)
    assert alone.shape == (2, 3, 16, 16)
    outputs = project.layout_predictor.image_out.bias
    for logit, expected in ((9.0, alone), (-9.0, None)):
        with torch.no_grad():
            outputs[0] = logit
        found = project.draft_image(embeds, style, text_encoder_hidden_states=encodings)
        if expected is None:
            layout, guess = project.predict_layout(encodings)
            expected = project.compose(layout.embeddings(guess), layout.boxes, layout.present > 0, layout.background, style)
            other = project.draft_image(-embeds, style, text_encoder_hidden_states=encodings)
            torch.testing.assert_close(other, found), "a scene's draft is that of its text"
        torch.testing.assert_close(found, expected)
    guided = project.draft_image(embeds, style, True, torch.cat([normal(2, 5, 12, seed=9), encodings]))
    assert guided[:2].abs().max() == 0
    torch.testing.assert_close(guided[2:], found)


def test_a_layout_needs_opacity_and_predicted_embeddings():
    with pytest.raises(ValueError, match="layout needs draft with opacity, and text_images"):
        UnCLIPTextProjModel(**SIZES, draft={"size": 8}, layout={}, text_images=True)


def test_saved_is_loaded(project, tmp_path):
    project.save_pretrained(tmp_path)
    loaded = UnCLIPTextProjModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    embeds, encodings = normal(2, 12), normal(2, 5, 12, seed=1)
    found = [p.draft_image(embeds, text_encoder_hidden_states=encodings) for p in (project, loaded)]
    torch.testing.assert_close(*found)
