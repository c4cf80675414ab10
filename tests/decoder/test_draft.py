"""The draft head, and the decoder's further inputs: draft, position maps and style."""

import pytest
import torch
from conftest import randomise

from decoder import Decoder, DraftHead, UnCLIPTextProjModel
from decoder.draft import DraftSkip

SIZES = {
    "channels": [16, 32],
    "blocks": [1, 1],
    "attention": [False, True],
    "head_dim": 16,
    "cross_attention_dim": 24,
    "time_embed_dim": 32,
    "sample_size": 16,
}
STYLES = ["flat", "3d"]


@pytest.fixture(scope="module")
def project() -> UnCLIPTextProjModel:
    draft = {"size": 8, "width": 16, "layers": 2}
    sizes = {"clip_embeddings_dim": 12, "time_embed_dim": 32, "cross_attention_dim": 24}
    return randomise(UnCLIPTextProjModel(**sizes, styles=STYLES, draft=draft)).double()


def given(batch: int = 3, height: int = 16, width: int = 16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"sample": (batch, 3, height, width), "encoder_hidden_states": (batch, 6, 24), "class_labels": (batch, 32)}
    made = {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    return made | {"timestep": torch.tensor(300)}


def test_a_new_head_answers_mid_gray():
    assert DraftHead(12, size=8, width=16, layers=1, styles=2)(torch.randn(2, 12)).abs().max() == 0


def test_new_inputs_change_nothing_before_training():
    plain = randomise(Decoder(**SIZES)).double()
    more = Decoder(**SIZES, draft_channels=3, draft_skip=True, position_maps=True).double()
    missing = more.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing.missing_keys} == {"draft_in", "draft_out", "position_embeddings"}
    draft = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(more(**given(), draft=draft).sample, plain(**given()).sample)


def test_draft_and_maps_are_used():
    decoder = randomise(Decoder(**SIZES, draft_channels=3, position_maps=True)).double()
    draft = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    base = decoder(**given(), draft=draft).sample
    assert not torch.allclose(decoder(**given(), draft=-draft).sample, base)
    torch.testing.assert_close(decoder(**given(), draft=torch.zeros_like(draft)).sample, decoder(**given()).sample)
    with torch.no_grad():
        decoder.position_embeddings[1][..., 0, 0] += 1
    assert not torch.allclose(decoder(**given(), draft=draft).sample, base)


def test_draft_skip_changes_examples_with_a_draft_alone():
    decoder = randomise(Decoder(**SIZES, draft_channels=3, draft_skip=True)).double()
    draft = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    draft[1] = 0
    full, without = decoder(**given(), draft=draft).sample, decoder(**given()).sample
    assert not torch.allclose(full[0], without[0])
    torch.testing.assert_close(full[1], without[1])
    torch.testing.assert_close(decoder(**given(height=24), draft=draft).sample, decoder(**given(height=24)).sample)


def test_an_open_draft_skip_is_the_posterior_mean():
    """Gaussian x0 around the draft: no other linear estimate of v from sample and draft has a smaller error."""
    g, variance = torch.Generator().manual_seed(3), 0.015
    skip = DraftSkip(4, 8, variance=variance).double()
    skip.alphas_cumprod.copy_(torch.linspace(0.999, 1e-3, 1000))
    with torch.no_grad():
        skip.gate.bias.fill_(1)
    draft = torch.randn(64, 3, 16, 16, generator=g, dtype=torch.float64)
    x0 = draft + variance**0.5 * torch.randn(draft.shape, generator=g, dtype=torch.float64)
    noise = torch.randn(draft.shape, generator=g, dtype=torch.float64)
    for t in (20, 500, 980):
        signal = skip.alphas_cumprod[t]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        sample, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
        unused = torch.zeros(64, 4, 8, 8, dtype=torch.float64)
        found = skip(torch.zeros_like(v), sample, draft, torch.tensor([t]), torch.zeros(1, 8, dtype=torch.float64), unused)
        inputs, wanted = torch.stack([sample.flatten(), draft.flatten()], 1), v.flatten()[:, None]
        best = (inputs @ torch.linalg.lstsq(inputs, wanted).solution - wanted).square().mean()
        assert (found.detach() - v).square().mean() == pytest.approx(best.item(), rel=1e-3)


def test_draft_skip_needs_three_channels():
    with pytest.raises(ValueError, match="draft_skip needs 3 in_channels, out_channels and draft_channels, got 7, 3 and 3"):
        Decoder(**SIZES, in_channels=7, draft_channels=3, draft_skip=True)


def test_other_sizes_resize_the_draft_and_other_proportions_leave_it_out():
    decoder = randomise(Decoder(**SIZES, draft_channels=3, position_maps=True)).double()
    draft = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    large = given(height=24, width=24)
    assert not torch.allclose(decoder(**large, draft=draft).sample, decoder(**large).sample)
    wide = given(height=16, width=24)
    torch.testing.assert_close(decoder(**wide, draft=draft).sample, decoder(**wide).sample)


def test_the_null_embedding_has_no_draft_and_no_style(project):
    g = torch.Generator().manual_seed(2)
    embeds = torch.randn(3, 12, generator=g, dtype=torch.float64)
    style = torch.tensor([0, 1, 0])
    guided = project.draft_image(embeds, style, do_classifier_free_guidance=True)
    assert guided.shape == (6, 3, 8, 8)
    assert guided[:3].abs().max() == 0
    torch.testing.assert_close(guided[3:], project.draft_image(embeds, style))
    text = {"prompt_embeds": torch.zeros(6, 12), "text_encoder_hidden_states": torch.zeros(6, 4, 12)}
    text = {name: value.double() for name, value in text.items()}
    context, added = project(image_embeddings=embeds, **text, style=style, do_classifier_free_guidance=True)
    null = project.learned_classifier_free_guidance_embeddings.expand(3, -1)
    halves = [
        project(image_embeddings=e, **{k: v[:3] for k, v in text.items()}, style=s)
        for e, s in ((null, torch.full((3,), len(STYLES))), (embeds, style))
    ]
    torch.testing.assert_close(context, torch.cat([half[0] for half in halves]))
    torch.testing.assert_close(added, torch.cat([half[1] for half in halves]))


def test_no_named_style_has_an_embedding_like_any_style(project):
    g = torch.Generator().manual_seed(3)
    embeds = torch.randn(2, 12, generator=g, dtype=torch.float64)
    unnamed = project.draft_image(embeds)
    torch.testing.assert_close(unnamed, project.draft_image(embeds, torch.tensor([2, 2])))
    drafts = [unnamed, *(project.draft_image(embeds, torch.tensor([n, n])) for n in (0, 1))]
    assert all(not torch.allclose(a, b) for n, a in enumerate(drafts) for b in drafts[:n])


def test_rows_of_a_batch_do_not_see_each_other(project):
    g = torch.Generator().manual_seed(4)
    embeds, style = torch.randn(4, 12, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    one_by_one = [project.draft_image(embeds[n : n + 1], style[n : n + 1]) for n in range(4)]
    torch.testing.assert_close(project.draft_image(embeds, style), torch.cat(one_by_one))


def test_saved_is_loaded(project, tmp_path):
    project.save_pretrained(tmp_path)
    loaded = UnCLIPTextProjModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    embeds = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(loaded.draft_image(embeds), project.draft_image(embeds))
