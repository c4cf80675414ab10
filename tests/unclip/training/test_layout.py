"""The stage `layout`, and the decoder that is trained on composed drafts."""

import json

import pytest
import torch
from conftest import randomise
from running import finals, rows, run_here
from safetensors.torch import load_file

from unclip.data.layouts import MAX_LAYERS
from unclip.runtime.config import ConfigError
from unclip.training.objectives.base import to_device
from unclip.training.objectives.decoder import DecoderObjective
from unclip.training.objectives.draft import DraftObjective
from unclip.training.objectives.layout import LayoutObjective

STYLES = ["noto", "flat", "3d", "twemoji"]
PROJECT = {"styles": STYLES, "draft": {"size": 16, "width": 32, "layers": 1, "opacity": True}, "text_images": True}
PROJECT |= {"text_layers": 1, "text_head_dim": 16, "layout": {"slots": 5, "width": 64, "layers": 1}}
MODEL = {"channels": [16, 32], "blocks": [1, 1], "attention": [False, True], "head_dim": 16, "cross_attention_dim": 32}
MODEL |= {"time_embed_dim": 32, "draft_channels": 3, "draft_skip": True, "text_proj": PROJECT}


@pytest.fixture(scope="module")
def run(clip, tmp_path_factory):
    settings = f"objective.clip={clip}", "max_steps=60", "batch_size=16", "ema=0", "learning_rate=3e-3", "validate_every=60"
    return run_here("layout", tmp_path_factory.mktemp("layout"), *settings)


def test_the_places_are_learned_from_captions(run):
    first, last = rows(run, "train")[0], rows(run, "train")[-1]
    assert last["boxes"] < 0.6 * first["boxes"]
    assert last["present"] < 0.6 * first["present"]
    assert rows(run, "validation")[-1].keys() >= {"boxes", "present", "single_right", "number_right", "what"}


def test_a_stopped_run_ends_as_an_unbroken_one(clip, tmp_path):
    settings = f"objective.clip={clip}", "max_steps=8", "batch_size=4", "save_every=3"
    unbroken = run_here("layout", tmp_path / "unbroken", *settings)
    run_here("layout", tmp_path / "stopped", *settings, stop_at=3)
    assert finals(unbroken) == finals(run_here("layout", tmp_path / "stopped", *settings))


def test_only_the_predictor_is_trained(run, clip, tmp_path):
    """A run that starts from another changes nothing else."""
    longer = run_here("layout", tmp_path, f"objective.clip={clip}", f"init_from={run}", "max_steps=2", "batch_size=4")
    before, after = (load_file(next((r / "final" / "text_proj").glob("*.safetensors"))) for r in (run, longer))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("layout_predictor.") for name in changed)


def test_a_model_without_layout_is_refused(clip):
    model = MODEL | {"text_proj": {k: v for k, v in PROJECT.items() if k != "layout"}}
    with pytest.raises(ConfigError, match=r"needs model.text_proj.layout with at least 5 slots"):
        LayoutObjective(model, {"path": "shapes"}, 0, str(clip / "final"))


def test_layout_without_a_prior_is_refused_for_the_decoder(clip):
    with pytest.raises(ConfigError, match=r"model.text_proj.layout needs objective.prior"):
        DecoderObjective(MODEL, {"path": "shapes"}, 0, str(clip / "final"))


def test_the_decoder_is_given_the_objects_in_their_true_places(clip, prior):
    settings = {"prior": str(prior), "samples": 2, "drop_draft": 0.1, "drop_text": 0.2, "drop_both": 0.0, "sampled": 0.5}
    data = {"path": "shapes", "single_pose": True}
    objective = DecoderObjective(MODEL, data, 0, str(clip / "final"), **settings)
    project = randomise(objective.trained["text_proj"])
    seen = []
    objective.trained["decoder"].register_forward_pre_hook(lambda m, a, k: seen.append(k["draft"]), with_kwargs=True)
    loaded = torch.utils.data.default_collate([objective.examples[n] for n in range(64)])
    objective(to_device(loaded, torch.device("cpu")))[0].backward()
    assert all(p.grad is None for p in project.layout_predictor.parameters())
    draft, random = seen[0], loaded["random"]
    scene, dropped, no_text = loaded["icon"] < 0, random[:, 12] < 0.1, random[:, 4] < 0.2
    assert torch.equal((draft == 0).flatten(1).all(1)[scene], (dropped | no_text)[scene])
    true = objective.icon_bank.embeds()[loaded["layers"].clamp_min(0)]
    assert true.shape[1] == MAX_LAYERS
    styles = objective.style(loaded)
    composed = project.compose(true, loaded["boxes"], loaded["layers"] >= 0, loaded["background"], styles)
    from_icons = scene & ~dropped & ~no_text & (random[:, 10] >= 0.5)
    from_text = scene & ~dropped & ~no_text & (random[:, 10] < 0.5)
    assert from_icons.any()
    assert from_text.any()
    torch.testing.assert_close(draft[from_icons], composed[from_icons])
    assert not torch.allclose(draft[from_text], composed[from_text])


def test_the_head_learns_from_what_the_text_predicts(run, clip, tmp_path):
    settings = [f"objective.clip={clip}", f"init_from={run}", "objective.from_text=0.5", "max_steps=12", "batch_size=16"]
    project = ",".join(f"{k}: {json.dumps(v)}" for k, v in PROJECT.items())
    trained = run_here("draft", tmp_path, *settings, f"model.text_proj={{{project}}}", "ema=0")
    first, last = rows(trained, "train")[0], rows(trained, "train")[-1]
    assert last["text"] < 0.8 * first["text"]
    objective = DraftObjective(MODEL, {"path": "shapes"}, 0, str(clip / "final"), from_text=0.5)
    examples = torch.utils.data.default_collate([objective.examples[n] for n in range(64)])
    batch = objective.to_tensors(examples)
    from_text = examples["random"][:, 0] < 0.5
    assert torch.equal(batch["from_text"], from_text)
    assert not torch.isclose(batch["embeds"], objective.icon_bank.embeds()[examples["row"]]).all(1)[from_text].any()
    torch.testing.assert_close(batch["embeds"][~from_text], objective.icon_bank.embeds()[examples["row"]][~from_text])


def test_embeddings_from_text_need_a_layout(clip):
    model = MODEL | {"text_proj": {k: v for k, v in PROJECT.items() if k != "layout"}}
    with pytest.raises(ConfigError, match=r"objective.from_text needs model.text_proj.layout"):
        DraftObjective(model, {"path": "shapes"}, 0, str(clip / "final"), from_text=0.5)
