"""The decoder and its conditioning."""

import pytest
import torch
from conftest import randomise
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as Deprecated

import decoder as decoder_package
from decoder import Decoder, UnCLIPTextProjModel, expand_to_context
from decoder.blocks import SpatialAttention


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    sizes = {"channels": [16, 32], "blocks": [1, 1], "attention": [False, True]}
    return randomise(Decoder(**sizes, head_dim=16, cross_attention_dim=24, time_embed_dim=32)).double()


def inputs(batch: int = 2, height: int = 16, width: int = 16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {
        "sample": (batch, 3, height, width),
        "encoder_hidden_states": (batch, 6, 24),
        "class_labels": (batch, 32),
    }
    made = {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    return made | {"timestep": torch.tensor(300), "attention_mask": torch.ones(batch, 6, dtype=torch.bool)}


def test_the_old_name_of_expand_to_context_warns():
    with pytest.warns(DeprecationWarning, match="decoder.of_context is now decoder.expand_to_context"):
        assert decoder_package.of_context is expand_to_context


def test_a_new_decoder_answers_zero():
    fresh = Decoder(channels=[16], blocks=[1], attention=[True], head_dim=16, cross_attention_dim=24, time_embed_dim=32)
    assert fresh.double()(**inputs()).sample.abs().max() == 0


@pytest.mark.parametrize("channels", [(16, 16), (16, 32, 32), (16, 16, 32), (32, 16, 16)])
def test_neighbouring_levels_may_be_as_wide(channels):
    levels = len(channels)
    sizes = {"channels": channels, "blocks": [1] * levels, "attention": [False] * (levels - 1) + [True]}
    made = randomise(Decoder(**sizes, head_dim=16, cross_attention_dim=24, time_embed_dim=32)).double()
    assert made(**inputs()).sample.shape == (2, 3, 16, 16)


def test_every_condition_is_seen_and_padding_is_not(decoder):
    given = inputs()
    base = decoder(**given).sample
    assert base.shape == (2, 3, 16, 16)
    for name in ("encoder_hidden_states", "class_labels", "timestep"):
        assert not torch.allclose(decoder(**(given | {name: given[name] + 1})).sample, base)
    mask = given["attention_mask"].clone()
    mask[:, 4:] = False
    hidden = given["encoder_hidden_states"].clone()
    hidden[:, 4:] = 50.0
    answers = [
        decoder(**(given | {"attention_mask": mask, "encoder_hidden_states": h})).sample
        for h in (given["encoder_hidden_states"], hidden)
    ]
    torch.testing.assert_close(*answers)


def test_sizes_other_than_sample_size(decoder):
    assert decoder(**inputs(height=24, width=8)).sample.shape == (2, 3, 24, 8)
    with pytest.raises(ValueError, match=r"multiples of 4, got \[18, 16\]"):
        decoder(**inputs(height=18))


def test_memory_layout_changes_nothing(decoder):
    given = inputs()
    base = decoder(**given).sample
    turned = decoder.to(memory_format=torch.channels_last)
    torch.testing.assert_close(turned(**given).sample, base)


def test_positions_are_zero_at_initialisation_and_distinguish_pixels():
    """The same pixels everywhere, seen without the borders of a convolution: only a position can tell them apart."""
    sizes = {"channels": 16, "context_dim": 24, "head_dim": 16}
    g = torch.Generator().manual_seed(2)
    one, context = torch.randn(1, 16, 1, 1, generator=g).double(), torch.randn(1, 6, 24, generator=g).double()
    plain, positioned = SpatialAttention(**sizes).double(), SpatialAttention(**sizes, positions=True).double()
    randomise(plain)
    missing = positioned.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["position.weight"]
    pixels = one.expand(1, 16, 4, 6)
    torch.testing.assert_close(positioned(pixels, context), plain(pixels, context), rtol=0, atol=0)
    torch.nn.init.normal_(positioned.position.weight)
    everywhere = positioned(pixels, context).flatten(2)[0].T  # [H*W, C]
    assert torch.cdist(everywhere, everywhere).fill_diagonal_(1).min() > 1e-6
    same = plain(pixels, context).flatten(2)[0].T
    assert torch.cdist(same, same).max() < 1e-6


def test_text_layers_attend_to_the_full_sentence_and_to_no_padding():
    sizes = {"clip_embeddings_dim": 12, "time_embed_dim": 16, "cross_attention_dim": 32, "text_head_dim": 16}
    project = randomise(UnCLIPTextProjModel(**sizes, text_layers=2)).double()
    image, text, encodings = (torch.randn(2, *shape).double() for shape in ((12,), (12,), (5, 12)))
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])

    def text_context(encodings: torch.Tensor, mask: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        given = {"image_embeddings": image[rows], "prompt_embeds": text[rows], "text_mask": mask}
        return project(text_encoder_hidden_states=encodings, **given)[0][:, 4:]

    both = text_context(encodings, mask)
    torch.testing.assert_close(text_context(encodings[:1, :3], mask[:1, :3], slice(1)), both[:1, :3])  # unpadded, alone
    padded = encodings.clone()
    padded[0, 3:] = 50.0
    torch.testing.assert_close(text_context(padded, mask)[:1, :3], both[:1, :3])
    later = encodings.clone()
    later[1, 4] += 1
    assert not torch.allclose(text_context(later, mask)[1, 0], both[1, 0]), "the first word depends on the last one"


@pytest.mark.parametrize("guided", [False, True])
def test_conditioning_is_that_of_diffusers(guided):
    sizes = {"clip_embeddings_dim": 12, "time_embed_dim": 16, "cross_attention_dim": 20}
    theirs, ours = randomise(Deprecated(**sizes)).double(), UnCLIPTextProjModel(**sizes).double()
    ours.load_state_dict(theirs.state_dict())
    texts = 4 if guided else 2
    given = {
        "image_embeddings": torch.randn(2, 12, dtype=torch.float64),
        "prompt_embeds": torch.randn(texts, 12, dtype=torch.float64),
        "text_encoder_hidden_states": torch.randn(texts, 5, 12, dtype=torch.float64),
        "do_classifier_free_guidance": guided,
    }
    for a, b in zip(ours(**given), theirs(**given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_embedding_scale_only_scales_the_embeddings():
    sizes = {"clip_embeddings_dim": 12, "time_embed_dim": 16, "cross_attention_dim": 20}
    plain = randomise(UnCLIPTextProjModel(**sizes)).double()
    scaled = UnCLIPTextProjModel(**sizes, embedding_scale=3.0).double()
    scaled.load_state_dict(plain.state_dict())
    image, text, encodings = torch.randn(2, 12).double(), torch.randn(2, 12).double(), torch.randn(2, 5, 12).double()
    a = plain(image_embeddings=3 * image, prompt_embeds=3 * text, text_encoder_hidden_states=encodings)
    b = scaled(image_embeddings=image, prompt_embeds=text, text_encoder_hidden_states=encodings)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_a_token_that_predicts_an_image_embedding_has_that_images_context_tokens():
    sizes = {"clip_embeddings_dim": 12, "time_embed_dim": 16, "cross_attention_dim": 32, "embedding_scale": 12**0.5}
    project = UnCLIPTextProjModel(**sizes, text_images=True).double()
    image, text, encodings = (torch.randn(2, *shape).double() for shape in ((12,), (12,), (5, 12)))
    image = torch.nn.functional.normalize(image, dim=-1)
    with torch.no_grad():
        project.text_to_image[-1].weight.zero_()
        project.text_to_image[-1].bias.copy_(3 * image[1])  # of any length
    given = {"image_embeddings": image, "prompt_embeds": text, "text_encoder_hidden_states": encodings}
    context, _ = project(**given)
    images = context[:, 4 + 5 :].unflatten(1, (5, 4))  # of each token
    torch.testing.assert_close(images, context[1, :4].expand_as(images))
    marks = torch.arange(10).view(2, 5)
    where = expand_to_context(project, marks, -1)
    assert where.shape == context.shape[:2] and (where[:, :4] == -1).all()
    assert torch.equal(where[:, 4:9], marks)
    assert torch.equal(where[:, 9:].unflatten(1, (5, 4)), marks[..., None].expand(2, 5, 4))
    with torch.no_grad():
        torch.nn.init.normal_(project.text_image_places.weight)
    other = project(**given)[0][:, 9:].unflatten(1, (5, 4))
    assert (other - images).std(2).max() < 1e-9 and (other - images).std(1).min() > 1e-3, "a token's four move together"
