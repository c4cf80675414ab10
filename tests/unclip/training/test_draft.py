"""The stage `draft`, and the decoder that is trained with its head: from configuration to images."""

import json

import pytest
import torch
from conftest import seeds
from running import finals, rows, run_here
from safetensors.torch import load_file

from unclip import UnCLIPPipeline
from unclip.data.icons import IconSet
from unclip.data.plans import split_of_icon
from unclip.io.checkpoints import load_component
from unclip.runtime.config import ConfigError
from unclip.training.objectives.base import to_device
from unclip.training.objectives.decoder import DecoderObjective
from unclip.training.objectives.draft import DraftObjective

STYLES = ["noto", "flat", "3d", "twemoji"]
PROJECT = {"styles": STYLES, "draft": {"size": 16, "width": 32, "layers": 1}}
MODEL = {"channels": [16, 32], "blocks": [1, 1], "attention": [False, True], "head_dim": 16, "cross_attention_dim": 32}
MODEL |= {"time_embed_dim": 32, "draft_channels": 3, "position_maps": True, "text_proj": PROJECT}


@pytest.fixture(scope="module")
def head(clip, prior, tmp_path_factory):
    """A run of 12 steps, half of its embeddings sampled by a prior."""
    settings = f"objective.clip={clip}", f"objective.prior={prior}", "objective.samples=2", "max_steps=12", "ema=0"
    return run_here("draft", tmp_path_factory.mktemp("draft"), *settings, "batch_size=16", "validate_every=12")


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(next((run / "final" / "text_proj").glob("*.safetensors")))


def test_the_head_learns_and_standardises_by_the_icons(head):
    train = rows(head, "train")
    assert train[-1]["loss"] < 0.7 * train[0]["loss"]
    assert rows(head, "validation")[-1].keys() >= {"true", "sampled", "held_out"}
    saved = weights(head)
    assert saved["draft_head.mean"].abs().max() > 0
    assert not torch.allclose(saved["draft_head.std"], torch.full_like(saved["draft_head.std"], 32**-0.5))


def test_a_stopped_run_ends_as_an_unbroken_one(head, clip, prior, tmp_path):
    settings = f"objective.clip={clip}", f"objective.prior={prior}", "objective.samples=2", "max_steps=12", "ema=0"
    settings += "batch_size=16", "save_every=5"
    run_here("draft", tmp_path, *settings, stop_at=5)
    resumed = run_here("draft", tmp_path, *settings)
    assert finals(head) == finals(resumed)


def test_held_out_icons_are_not_trained_on(clip):
    objective = DraftObjective(MODEL, {"path": "shapes"}, 0, str(clip / "final"))
    icons = IconSet.load("shapes")
    for index in range(200):
        icon = icons.icons[objective.examples[index]["row"]]
        assert split_of_icon(icon["concept"], icon["style"]) == "train"


def test_a_model_without_a_draft_is_refused(clip):
    with pytest.raises(ConfigError, match=r"needs model.text_proj with a draft and styles: \[noto, flat, 3d, twemoji\]"):
        DraftObjective(MODEL | {"text_proj": {}}, {"path": "shapes"}, 0, str(clip / "final"))


def decoder_objective(clip, **settings) -> DecoderObjective:
    data = {"path": "shapes", "single_pose": True}
    return DecoderObjective(MODEL, data, 0, str(clip / "final"), **settings)


def batch(objective: DecoderObjective, count: int = 12) -> dict:
    return to_device(torch.utils.data.default_collate([objective.examples[n] for n in range(count)]), torch.device("cpu"))


def test_the_decoder_is_given_draft_and_style_and_leaves_the_head_alone(clip):
    objective = decoder_objective(clip, drop_draft=0.25, drop_style=0.5, drop_both=0.0, drop_image=0.0)
    head = objective.trained["text_proj"].draft_head
    torch.nn.init.normal_(head.proj_out.bias)
    seen = []
    objective.trained["decoder"].register_forward_pre_hook(lambda m, a, k: seen.append(k["draft"]), with_kwargs=True)
    examples = batch(objective, 64)
    loss, _ = objective(examples)
    loss.backward()
    dropped = (seen[0] == 0).flatten(1).all(1)
    assert torch.equal(dropped, examples["random"][:, 12] < 0.25)
    style = objective.style(examples)
    assert torch.equal(style == len(STYLES), examples["random"][:, 13] < 0.5)
    assert torch.equal(style[style < 4], examples["style"][style < 4])
    assert all(p.grad is None for p in head.parameters())
    assert objective.trained["decoder"].conv_out.weight.grad.abs().sum() > 0


def test_a_share_of_single_icons_has_embeddings_of_the_prior(clip, prior):
    objective = decoder_objective(clip, prior=str(prior), sampled=0.5, samples=2)
    examples = objective.to_tensors(batch(objective, 48))
    true = objective.encode_image(examples)
    given = objective.with_sampled_embeddings(examples, true)
    changed = (given != true).any(1)
    assert torch.equal(changed, (examples["icon"] >= 0) & (examples["random"][:, 10] < 0.5))
    seen = changed & ~objective.dropped(examples["random"])[0]
    embeds = objective.condition_inputs(examples, true)[1]
    assert seen.any() and torch.equal(embeds[seen], given[seen]), "without noise of its own"
    torch.testing.assert_close(given.norm(dim=1), true.norm(dim=1), atol=1e-4, rtol=1e-4)


def test_a_prior_of_another_clip_is_refused(clip):
    with pytest.raises(ConfigError, match=r"objective.prior .*emoji was trained for the CLIP \w+, but objective.clip is \w+"):
        decoder_objective(clip, prior="emoji")


def test_grounding_is_a_loss_of_every_nth_batch(clip):
    objective = decoder_objective(clip, grounding=1.0, grounding_every=2)
    objective.examples.sampler.kinds, objective.examples.sampler._kind_weights = ["relation"], [1.0]
    shown = []
    for first in (0, 4, 8):
        examples = [objective.examples[n] for n in range(first, first + 4)]
        shown.append("where" in objective(to_device(torch.utils.data.default_collate(examples), torch.device("cpu")))[1])
    assert shown == [True, False, True]


def test_a_decoder_trained_with_the_head_draws_in_the_named_style(head, clip, tiny_folder, tmp_path):
    """Run after run: the head, a decoder from it, and a pipeline of both."""
    settings = [f"objective.clip={clip}", f"init_from={head}", "max_steps=2", "batch_size=2", "data.single_pose=true"]
    settings += ["model.draft_channels=3", "model.position_maps=true", f"model.text_proj.styles=[{','.join(STYLES)}]"]
    settings += ["model.text_proj.draft={size: 16, width: 32, layers: 1}"]
    run = run_here("decoder", tmp_path / "decoder", *settings)
    before, after = weights(head), weights(run)
    names = [n for n in before if n.startswith("draft_head.")]
    assert names
    assert all(torch.equal(before[n], after[n]) for n in names)
    parts = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float32).components
    index = json.loads((run / "final" / "model_index.json").read_text())
    for name in ("decoder", "text_proj"):
        parts[name] = load_component(run / "final" / name, *index[name], dtype=torch.float32)
    head_of = parts["text_proj"].draft_head
    for layer in (head_of.style_embedding, parts["text_proj"].style_embedding, parts["decoder"].conv_out):
        torch.nn.init.normal_(layer.weight)
    pipe = UnCLIPPipeline(**parts).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)

    def drawn(prompt: str | list[str], *numbers: int, **more) -> torch.Tensor:
        quick = {"size": 64, "output_type": "pt", "prior_num_inference_steps": 2, "decoder_num_inference_steps": 2}
        return pipe(prompt, generator=seeds(*numbers), **quick, **more).images

    flat = drawn("a star", 1, style="flat")
    assert not torch.allclose(drawn("a star", 1, style="3d"), flat)
    assert torch.equal(drawn("a star", 1, style="flat"), flat)
    both = drawn(["a star", "a moon, 3d style"], 1, 2)
    torch.testing.assert_close(both[1:], drawn("a moon, 3d style", 2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both[1:], drawn("a moon, 3d style", 2, style="3d"), atol=1e-6, rtol=1e-5)
    pipe.save_pretrained(tmp_path / "model")
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "model", dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn("a star", 1, style="flat"), flat, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="unknown style 'falt'.*flat.*choose from noto, flat, 3d, twemoji"):
        drawn("a star", 1, style="falt")


def test_a_model_without_styles_says_so(tiny):
    with pytest.raises(ValueError, match="unknown style 'flat': this model has no styles"):
        tiny("a star", style="flat")


def test_a_prior_is_told_the_style_and_a_pipeline_passes_it_on(clip, prior, tiny_folder, tmp_path):
    """From a prior without styles: fine-tuned, exported and asked for two styles."""
    settings = f"objective.clip={clip}", f"init_from={prior}", f"model.styles=[{','.join(STYLES)}]", "data.single_pose=true"
    run = run_here("prior", tmp_path / "prior", *settings, "max_steps=3", "batch_size=8", "warmup_steps=0", "ema=0")
    styled = load_component(run / "final" / "prior", "prior.model", "DiffusionPrior", dtype=torch.float32)
    assert styled.style_embedding.weight.abs().max() > 0
    parts = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float32).components
    torch.nn.init.normal_(styled.style_embedding.weight)
    pipe = UnCLIPPipeline(**(parts | {"prior": styled})).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.styles == STYLES
    seen = []
    pipe.prior.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("style")), with_kwargs=True)
    drawn = [pipe("a star", style=s, generator=seeds(3), size=64, output_type="pt").images for s in ("flat", "3d", "flat")]
    assert not torch.allclose(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
