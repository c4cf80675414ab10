"""What the options of a configuration do to what is learned, and that fine-tuned networks go back into a pipeline."""

import json
import shutil

import karlo
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, seeds, tiny_networks
from PIL import Image
from running import finals, run_here, state
from safetensors.torch import load_file

from decoder import Decoder, UnCLIPTextProjModel, expand_to_context
from prior.blocks import Attention, name_shares, sdpa
from unclip import UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.io.checkpoints import load_component
from unclip.runtime.config import ConfigError, load_config
from unclip.training.objectives.decoder import DecoderObjective, inpainting_masks
from unclip.training.objectives.grounding import Grounding, name_distances, names_two
from unclip.training.objectives.text_proj import TextProjObjective, centres
from unclip.training.objectives.upsampler import UpsamplerObjective


@pytest.fixture(scope="module")
def plain(clip, tmp_path_factory):
    """A decoder after one step."""
    folder = tmp_path_factory.mktemp("plain")
    return run_here("decoder", folder, f"objective.clip={clip}", "max_steps=1", "batch_size=2", "ema=0", "warmup_steps=0")


def component(folder, name: str = "decoder"):
    index = json.loads((folder / "final" / "model_index.json").read_text())
    return load_component(folder / "final" / name, *index[name], dtype=torch.float32)


@pytest.mark.parametrize("name", ["prior", "decoder", "super_res_first", "image_encoder"])
def test_checkpointed_activations_change_no_gradient(name):
    network = tiny_networks()[name].train()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, {"super_res_first": 6}.get(name, 3), 64, 64, generator=g)
    arguments = {
        "prior": (torch.randn(2, 32, generator=g), 3, torch.randn(2, 32, generator=g), torch.randn(2, 16, 32, generator=g)),
        "decoder": (x, 3, torch.randn(2, 5, 32, generator=g)),
        "super_res_first": (x, 3),
        "image_encoder": (x,),
    }[name]
    calls = []
    block = next(m for n, m in network.named_modules() if type(m).__name__ in ("Block", "ResBlock"))
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointed in (False, True):
        network.zero_grad()
        if checkpointed:
            network.enable_gradient_checkpointing()
        network(*arguments, return_dict=False)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(calls) == 3, "once kept, then once forward and once more on the way back"


SMALL = {"channels": [16, 32], "blocks": [1, 1], "attention": [False, True], "head_dim": 16}
SMALL |= {"cross_attention_dim": 32, "time_embed_dim": 32}


def objective(clip, *, model: dict | None = None, **settings) -> DecoderObjective:
    return DecoderObjective(SMALL | (model or {}), {"path": "shapes"}, 0, str(clip / "final"), **settings)


def test_conditions_are_dropped_independently(clip):
    found = objective(clip, drop_image=0.3, drop_text=0.5, embedding_noise=0.0)
    dropped: dict[str, torch.Tensor] = {}
    null = found.trained["text_proj"].learned_classifier_free_guidance_embeddings

    def conditions(text, image_embeds, *more):
        dropped["image"] = (image_embeds == null).all(1)
        return plain(text, image_embeds, *more)

    def encode(tokens, mask):
        dropped["text"] = (tokens == found.frozen.empty_tokens[:, : tokens.shape[1]]).all(1)
        return of(tokens, mask)

    plain, of = found.conditions, found.frozen.encode
    found.conditions, found.frozen.encode = conditions, encode
    count = 1500
    random = torch.rand(count, 16, generator=torch.Generator().manual_seed(0))
    found.trained["decoder"].forward = lambda x, *_, **__: type("Answer", (), {"sample": x[:, :3]})
    example = found.examples[0]["image"]
    for n in range(0, count, 500):
        part = {"image": example.expand(500, -1, -1, -1), "caption": ["a star"] * 500, "index": torch.arange(n, n + 500)}
        with torch.no_grad():
            found.example_losses(found.to_tensors(part | {"random": random[n : n + 500]}))
        for key, value in list(dropped.items()):
            if key in ("image", "text"):
                dropped[f"{key}s"] = torch.cat([dropped.get(f"{key}s", value[:0]), value])
    image, text = dropped["images"].float(), dropped["texts"].float()
    assert image.mean() == pytest.approx(0.3, abs=0.04) and text.mean() == pytest.approx(0.5, abs=0.04)
    assert (image * text).mean() == pytest.approx(0.15, abs=0.03), "independently"


@pytest.fixture(scope="module")
def prior_run(clip, tmp_path_factory):
    """A prior's run for the module's CLIP."""
    return run_here("prior", tmp_path_factory.mktemp("prior") / "run", f"objective.clip={clip}", "max_steps=3", "batch_size=4")


def test_the_bound_teaches_the_variance_and_nothing_else(clip):
    """With the simple loss taken off, only the variance's channels have a gradient (arXiv 2102.09672, section 3.3)."""
    settings = {"model": {"out_channels": 6}, "prediction_type": "epsilon", "timesteps": "uniform"}
    found = objective(clip, **settings)
    torch.nn.init.normal_(found.trained["decoder"].conv_out.weight, std=0.02)
    batch = torch.utils.data.default_collate([found.examples[n] for n in range(4)])
    gradients = []
    for weight in (0.0, 1e-3):
        found.vlb_weight = weight
        found.zero_grad()
        found(batch)[0].backward()
        gradients.append(found.trained["decoder"].conv_out.weight.grad.clone())
    mean, variance = gradients[0].split(12), gradients[1].split(12)
    assert not mean[1].any() and variance[1].any()
    torch.testing.assert_close(mean[0], variance[0])


def test_variance_and_inpainting_begin_as_the_plain_decoder(clip, plain, tmp_path):
    settings = ("model.in_channels=7", "model.out_channels=6", "objective.prediction_type=epsilon", "max_steps=1")
    run = run_here(
        "decoder", tmp_path, f"objective.clip={clip}", f"init_from={plain}", *settings, "learning_rate=0", "batch_size=2"
    )
    wide, narrow = component(run), component(plain)
    g = torch.Generator().manual_seed(0)
    x, known, context = (torch.randn(2, *shape, generator=g) for shape in ((3, 64, 64), (4, 64, 64), (5, 32)))
    with torch.no_grad():
        found, wanted = wide(torch.cat([x, known], 1), 500, context).sample, narrow(x, 500, context).sample
    torch.testing.assert_close(found[:, :3], wanted)
    assert not found[:, 3:].any(), "between the two variances"
    pipe = UnCLIPPipeline(**(tiny_networks() | {"decoder": wide, "decoder_scheduler": component(run, "decoder_scheduler")}))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.decoder_scheduler.config.variance_type == "learned_range"
    drawn = pipe("a star", size=64, generator=seeds(0), output_type="pt", decoder_num_inference_steps=2).images
    assert drawn.isfinite().all()


@pytest.mark.parametrize("images", [False, True])
def test_text_layers_and_positions_begin_as_the_decoder_without_them(clip, plain, tmp_path, images):
    """Only what a token's guess looks like has something to say from the start."""
    settings = ("model.positions=true", "model.text_proj.text_layers=1", "model.text_proj.text_head_dim=16", "max_steps=1")
    settings += (f"model.text_proj.text_images={images}",)
    run = run_here(
        "decoder", tmp_path, f"objective.clip={clip}", f"init_from={plain}", *settings, "learning_rate=0", "batch_size=2"
    )
    networks, fewer = tiny_networks(), tiny_networks()
    for name in ("decoder", "text_proj"):
        networks[name], fewer[name] = component(run, name), component(plain, name)
    assert networks["text_proj"].text_blocks and networks["decoder"].config.positions
    drawn = []
    for parts in (networks, fewer):
        pipe = UnCLIPPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        few = {"size": 64, "output_type": "pt", "decoder_num_inference_steps": 2}
        alone = [pipe(text, generator=seeds(n), **few).images for n, text in enumerate(("a star", "two red hearts in a row"))]
        drawn.append(pipe(["a star", "two red hearts in a row"], generator=seeds(0, 1), **few).images)
        torch.testing.assert_close(torch.cat(alone), drawn[-1], rtol=0, atol=1e-3)
    if not images:
        torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


def test_padding_of_captions_changes_no_loss(clip):
    model = {"positions": True, "text_proj": {"text_layers": 1, "text_head_dim": 16, "text_images": True}}
    found = objective(clip, model=model, grounding=1.0)
    for parameter in found.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = torch.utils.data.default_collate([found.examples[n] for n in range(8)])
    losses = []
    for found.compiled in (False, True):  # where texts are of one length
        assert found.to_tensors(batch)["tokens"].shape[1] == (16 if found.compiled else 12)
        loss, metrics = found(batch)
        losses.append(torch.stack([loss, metrics["where"], metrics["what"]]))
    torch.testing.assert_close(*losses)


def test_grounding_tells_the_right_name_from_the_wrong_one():
    """Pixels of the left half look along one axis, those of the right half along another; the names' keys lie on them."""
    sizes = {"clip_embeddings_dim": 8, "time_embed_dim": 16, "cross_attention_dim": 32}
    sides = torch.ones(3, 8, 8, dtype=torch.int8)
    sides[:, :, 4:] = -1
    names = torch.tensor([[0, 1, 1, -1, 0, 0], [0, -1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.int8)
    left, right = torch.eye(16)[0], torch.eye(16)[1]
    query = torch.where(sides[0].flatten()[:, None] > 0, left, right)[None, :, None].expand(3, -1, 2, -1) * 12
    g = torch.Generator().manual_seed(0)
    embeds = F.normalize(torch.randn(3, 2, 8, generator=g), dim=-1)
    for images in (False, True):
        project = UnCLIPTextProjModel(**sizes, text_images=images)
        key = torch.zeros(3, 6, 2, 16)  # what each token would be seen by; the last two are no names
        key[:, 1:3], key[:, 3] = left * 12, right * 12
        key = torch.cat([torch.zeros(3, 4, 2, 16), key, *([key.repeat_interleave(4, 1)] if images else [])], 1)
        of_tokens = expand_to_context(project, names, 0)
        grounding = Grounding(names, sides, embeds, [name_shares(query, key, of_tokens)])
        losses = grounding.where()
        assert losses[0] < 1e-3 and losses[1] > 5, "the second's names stand the other way round"
        assert losses[2] == 0, "and the third caption names one thing"
        loss, shown = grounding.losses()
        torch.testing.assert_close(loss, losses.sum() / 3)
        torch.testing.assert_close(shown, {"where": losses[:2].mean()})
        grounding.shares = [name_shares(query * 0, key, of_tokens)] * 2
        torch.testing.assert_close(grounding.where()[1], torch.tensor(2.0).log(), msg="chance")
    guess = embeds[:1, :1].expand(-1, 6, -1)  # now every token is guessed to look like the first thing
    what, counted = name_distances(guess, names[:1], embeds[:1])
    assert what[0, 0] < 1e-6 and counted.all()
    torch.testing.assert_close(what[0, 1], 1 - (embeds[0, 0] * embeds[0, 1]).sum())
    what, counted = name_distances(guess.expand(3, -1, -1), names, embeds)
    assert counted.tolist() == [[True, True], [True, True], [True, False]] and what[2, 1] == 0


def plain_grounding(decoder, project, told: dict, names, sides, embeds) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`Grounding.losses` as it is defined, row by row, of queries and keys that are watched as they come by."""
    seen, layers = [], [m for m in decoder.modules() if isinstance(m, Attention) and m.context_kv is not None]
    for layer in layers:
        layer.function = lambda query, key, value, mask: seen.append((query, key)) or sdpa(query, key, value, mask)
    context, added, guess = project(**told["project"], return_guess=True)
    decoder(
        *told["decoder"],
        context,
        class_labels=added,
        attention_mask=expand_to_context(project, told["project"]["text_mask"], True),
    )
    what, where = [], []
    for row, (name, side) in enumerate(zip(expand_to_context(project, names, 0), sides, strict=True)):
        for number, sign in enumerate((1, -1)):
            tokens = guess[row][names[row] == sign]
            what += [(1 - F.cosine_similarity(tokens, embeds[row, None, number], dim=-1)).mean()] if len(tokens) else []
        if not ((name > 0).any() and (name < 0).any() and side.any()):
            continue
        of_layers = []
        for query, key in seen:
            scores = torch.einsum("nhd,mhd->hnm", query[row], key[row, : len(name)][name != 0]) / query.shape[-1] ** 0.5
            first = scores.softmax(-1)[..., name[name != 0] > 0].sum(-1).mean(0)  # [N]
            place = F.adaptive_avg_pool2d(side[None].float(), int(len(first) ** 0.5)).flatten()
            right = torch.where(place > 0, first, 1 - first).clamp_min(1e-6)
            of_layers.append(-(place.abs() * right.log()).sum() / place.abs().sum())
        where.append(torch.stack(of_layers).mean())
    what, where = torch.stack(what), torch.stack(where)
    return (what.sum() + where.sum()) / len(names), {"what": what.mean(), "where": where.mean()}


def test_grounding_over_all_rows_is_that_of_the_rows_that_name_two(clip):
    """Loss, what is logged and gradients, beside the plain definition; with dropped texts and names among the rows."""
    model = {
        "positions": True,
        "attention": [True, True],
        "text_proj": {"text_layers": 1, "text_head_dim": 16, "text_images": True},
    }
    found = objective(clip, model=model, grounding=1.0, drop_text=0.4)
    found.examples = type(found.examples)("shapes", kinds=["relation", "single", "pair", "colour"])
    randomised = torch.Generator().manual_seed(0)
    for parameter in found.trained.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=randomised))
    batch = found.to_tensors(torch.utils.data.default_collate([found.examples[n] for n in range(12)]))
    names = batch["names"].masked_fill(found.dropped(batch["random"])[1][:, None], 0)
    rows = names_two(names, batch["sides"])
    assert rows.any() and not rows.all() and not names.any(1).all()
    loss, shown = found.compute_loss(batch)
    simple, _ = super(DecoderObjective, found).compute_loss(batch)
    clean, image_embeds = found.images_and_embeddings(batch)
    text, image_embeds = found.condition_inputs(batch, image_embeds)
    noised, _, timesteps = found.add_noise(clean, batch)
    parts = ("prompt_embeds", "text_encoder_hidden_states", "text_mask")
    told = {"project": dict(zip(parts, text, strict=True)) | {"image_embeddings": image_embeds}, "decoder": (noised, timesteps)}
    networks = found.trained["decoder"], found.trained["text_proj"]
    wanted, means = plain_grounding(*networks, told, names, batch["sides"], batch["icon_embeds"])
    torch.testing.assert_close(loss - simple, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close({k: shown[k] for k in means}, {k: v.detach() for k, v in means.items()}, rtol=0, atol=1e-6)
    weights = [p for p in found.trained.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(value, weights, materialize_grads=True) for value in (loss - simple, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_tokens_are_found_by_the_characters_that_they_spell(clip):
    found = objective(clip)
    captions = ["a blue star left of a circle", "circle"]
    spans = torch.tensor([[[7, 11], [22, 28]], [[-1, -1], [-1, -1]]])
    names = found.frozen.tokens_of(captions, spans)
    tokenizer, ids = found.frozen.clip.tokenizer, found.frozen.tokenize(captions)["tokens"]
    assert [tokenizer.decode(ids[0][names[0] == sign]).replace(" ", "") for sign in (1, -1)] == ["star", "circle"]
    assert not names[1].any()


def test_a_grounded_decoder_attends_to_what_is_there(clip, tmp_path):
    """Text layers and positions start as the identity; what a pixel attends to is learned, and no text is no lesson."""
    model = "{channels: [16, 32], blocks: [1, 1], attention: [false, true], head_dim: 16, positions: true, "
    model += "cross_attention_dim: 32, time_embed_dim: 32, text_proj: {text_layers: 1, text_head_dim: 16, text_images: true}}"
    common = (f"objective.clip={clip}", f"model={model}", "data.kinds=[relation]", "batch_size=8", "learning_rate=6e-3")
    common += ("max_steps=140", "warmup_steps=0", "log_every=20", "objective.drop_both=0", "objective.drop_text=0")
    common += ("objective.resolution=32",)
    run_here("decoder", tmp_path / "run", *common, "objective.grounding=1")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    where, what = ([line[k] for line in lines if line["kind"] == "train"] for k in ("where", "what"))
    assert where[0] == pytest.approx(0.69, abs=0.12) and where[-1] < where[0] - 0.1
    assert what[-1] < what[0] - 0.1
    found = objective(clip, grounding=1.0, drop_text=1.0)
    batch = torch.utils.data.default_collate([found.examples[n] for n in range(8)])
    loss, metrics = found(batch)
    assert metrics["where"].isnan() and "what" not in metrics, "there are no guesses"
    found.grounding = 0.0
    torch.testing.assert_close(found(batch)[0], loss)


def test_a_decoder_shows_what_it_draws(clip):
    sheet = objective(clip, model={"text_proj": {"text_layers": 1, "text_head_dim": 16, "text_images": True}}).sample()
    assert sheet.size == (16 * 64, 3 * 64)


def test_a_grounded_run_that_was_interrupted_is_the_unbroken_one(clip, tmp_path):
    """What CLIP says of an icon does not depend on when it was asked, or beside which others."""
    settings = (f"objective.clip={clip}", "objective.grounding=1", "model.text_proj.text_images=true", "max_steps=4")
    settings += ("batch_size=8", "data.kinds=[single, pair]")
    unbroken = run_here("decoder", tmp_path / "unbroken", *settings)
    run_here("decoder", tmp_path / "broken", *settings, stop_at=2)
    run_here("decoder", tmp_path / "broken", *settings)
    one, other = state(unbroken), state(tmp_path / "broken")
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_text_layers_learn_from_captions_what_is_named_and_where(clip, tmp_path, capsys):
    """And a decoder starts from them."""
    settings = (f"objective.clip={clip}", "data.kinds=[relation, single]", "batch_size=32", "learning_rate=3e-3")
    run = run_here("text_proj", tmp_path / "text", *settings, "log_every=10", "max_steps=70", "validate_every=10")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for kind in ("train", "validation"):
        for name, factor in (("what", 0.85), ("where", 0.7)):
            found = [line[name] for line in lines if line["kind"] == kind]
            assert found[-1] < factor * found[0], (kind, name)
    assert [p.name for p in (run / "final").iterdir() if p.is_dir()] == ["text_proj"], "what reads the places off is not kept"
    told = component(run, "text_proj")
    model = ("model.text_proj.text_layers=1", "model.text_proj.text_head_dim=16", "model.text_proj.text_images=true")
    common = (f"objective.clip={clip}", "max_steps=1", "batch_size=2", "learning_rate=0", *model)
    decoder = run_here("decoder", tmp_path / "decoder", *common, f"init_from={run}")
    assert "it holds no decoder, which starts anew" in capsys.readouterr().err
    for name, weight in component(decoder, "text_proj").state_dict().items():
        torch.testing.assert_close(weight, told.state_dict()[name])
    with pytest.raises(ConfigError, match="decoder holds no .safetensors"):  # nothing to adapt
        run_here("decoder", tmp_path / "lora", *common, f"init_from={run}", "objective.lora={rank: 2}")


def test_centres_of_what_is_covered():
    covered = torch.zeros(2, 16, 16, dtype=torch.bool)
    covered[0, 4:8, 12:16] = True
    torch.testing.assert_close(centres(covered), torch.tensor([[0.875, 0.375], [0, 0]]))


def test_what_is_wholly_hidden_is_nowhere(clip):
    """A thing on top of another covers no place alone, and its name is not taught to mean a corner."""
    model = SMALL | {"text_proj": {"text_layers": 1, "text_head_dim": 16, "text_images": True}}
    found = TextProjObjective(model, {"path": "shapes", "kinds": ["relation"]}, 0, str(clip / "final"))
    batch = torch.utils.data.default_collate([found.examples[n] for n in range(16)])
    for parameter in found.trained["places"].parameters():
        torch.nn.init.zeros_(parameter)
    sides = torch.zeros_like(batch["sides"])
    assert found(batch | {"sides": sides})[1]["where"].isnan()
    sides[:, 4:8, 12:16] = 1
    torch.testing.assert_close(found(batch | {"sides": sides})[1]["where"], torch.tensor((0.875 + 0.375) / 2))


def test_missing_emoji_are_said_to_be_missing(clip, tmp_path):
    """And not that a folder of images has no `kinds`."""
    common = (f"objective.clip={clip}", "data.kinds=[single]", "max_steps=1")
    with pytest.raises(FileNotFoundError, match=r"none is not a folder; .*unclip data emoji --out"):
        run_here("text_proj", tmp_path / "run", *common, f"data.path={tmp_path / 'none'}")


def test_text_layers_cannot_be_taught_without_names(clip, tmp_path):
    for setting, message in (
        ("model.text_proj.text_layers=0", "text_layers above 0 and text_images: true"),
        ("model.text_proj.text_images=false", "text_layers above 0 and text_images: true"),
        ("objective.where=-1", "objective.where must be at least 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_here("text_proj", tmp_path, f"objective.clip={clip}", setting, "max_steps=1")
    (tmp_path / "own").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "own" / "a.png")
    (tmp_path / "own" / "a.txt").write_text("a square")
    with pytest.raises(ConfigError, match="text_proj needs emoji scenes"):
        run_here("text_proj", tmp_path, f"objective.clip={clip}", f"data.path={tmp_path / 'own'}", "max_steps=1")


def test_what_cannot_be_grounded_is_refused(clip, tmp_path):
    with pytest.raises(ConfigError, match=r"objective.grounding must be at least 0, got -1"):
        objective(clip, grounding=-1)
    images = tmp_path / "own"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    (images / "a.txt").write_text("a square")
    with pytest.raises(ConfigError, match="objective.grounding needs emoji scenes"):
        run_here("decoder", tmp_path / "run", f"objective.clip={clip}", "objective.grounding=1", f"data.path={images}")


def test_an_inpainting_decoder_sees_what_is_kept():
    torch.manual_seed(0)
    parts = tiny_networks()
    parts["decoder"] = Decoder(**(dict(parts["decoder"].config) | {"in_channels": 7})).eval()
    for parameter in parts["decoder"].parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    pipe = UnCLIPInpaintPipeline.from_pipe(UnCLIPPipeline(**parts))
    pipe.set_progress_bar_config(disable=True)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    seen = []
    pipe.decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["sample"]), with_kwargs=True)
    steps = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2}
    for colour in ("red", "blue"):
        image = Image.new("RGB", (64, 64), colour)
        drawn = pipe("a star", image, mask, size=64, generator=seeds(0), output_type="np", **steps).images[0]
        assert abs(drawn[40:] - [colour == "red", 0, colour == "blue"]).max() < 1e-6
    first, last = seen[0][0], seen[-1][0]
    assert (first[6, :32] == 1).all() and (first[6, 32:] == 0).all()
    assert not first[3:6, :32].any() and (first[3, 32:] == 1).all() and (last[3, 32:] == -1).all()


def test_holes_are_rectangles_and_now_and_then_everything():
    found = inpainting_masks(torch.rand(400, 5, generator=torch.Generator().manual_seed(0)), 64)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    share = found.mean((1, 2, 3))
    assert (share > 0).all() and (share == 1).float().mean() == pytest.approx(0.2, abs=0.06)
    rows, columns = found.amax(3), found.amax(2)
    assert torch.equal(found, rows[..., None] * columns[..., None, :])


@pytest.mark.parametrize("stage", ["prior", pytest.param("decoder", marks=pytest.mark.slow)])
def test_an_adapter_is_trained_resumed_and_loaded_into_a_pipeline(clip, plain, tmp_path, stage):
    common = (f"objective.clip={clip}", "batch_size=2", "warmup_steps=0", "ema=0")
    base = plain if stage == "decoder" else run_here("prior", tmp_path / "base", *common, "max_steps=1")
    settings = (*common, f"init_from={base}", "objective.lora={rank: 2, dropout: 0.1}", "max_steps=4", "save_every=1")
    run = run_here(stage, tmp_path / "run", *settings)
    broken = run_here(stage, tmp_path / "broken", *settings, stop_at=2)
    assert not (broken / "final").exists()
    run_here(stage, broken, *settings)
    one, two = state(run), state(broken)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert all("lora_" in name for name in one), "a checkpoint holds the adapter alone"
    assert finals(run) == finals(broken)

    networks = tiny_networks() | {stage: component(base, stage)}
    pipe = UnCLIPPipeline(**networks).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe("a star", size=64, generator=seeds(0), output_type="pt", prior_num_inference_steps=2).images

    before = draw()
    pipe.load_lora_weights(run / "final")
    tuned = dict(networks[stage].named_parameters())
    trained = load_file(run / "checkpoint-00000004" / "weights.safetensors")
    for name, value in trained.items():
        assert torch.equal(tuned[name.removeprefix(f"{stage}.")], value)
    assert (draw() - before).abs().max() > 0
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(), before)


def test_adapters_that_cannot_be_are_refused(clip, plain, tmp_path):
    common = (f"objective.clip={clip}", "max_steps=1", "batch_size=2")
    with pytest.raises(ConfigError, match="name them by init_from="):
        run_here("decoder", tmp_path / "a", *common, "objective.lora={}")
    with pytest.raises(ConfigError, match="unknown key objective.lora.rnk \\(did you mean 'rank'"):
        run_here("decoder", tmp_path / "b", *common, "objective.lora={rnk: 2}")
    with pytest.raises(ConfigError, match="no layer's name ends in nonsense"):
        run_here("decoder", tmp_path / "c", *common, f"init_from={plain}", "objective.lora={targets: [nonsense]}")
    damaged = shutil.copytree(plain / "final", tmp_path / "damaged")
    (weights,) = (damaged / "decoder").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{weights.name} is truncated or damaged"):
        run_here("decoder", tmp_path / "c", *common, f"init_from={damaged}")
    with pytest.raises(ConfigError, match="not v_prediction"):
        run_here("decoder", tmp_path / "d", *common, "model.out_channels=6")


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("decoder", ["data.size=96"], "data.size is 96, which is no multiple of the 64 px that the decoder is trained at"),
        ("decoder", ["objective.resolution=0"], "data.size is 64, which is no multiple of the 0 px"),
        ("decoder", ["data.size=0"], "size must be at least 1, got 0"),
        ("decoder", ["data.max_unreadable=-1"], "max_unreadable must be at least 0, got -1"),
        ("decoder", ["objective.lora={dropout: 1}"], "dropout must be from 0 to less than 1, got 1"),
        ("prior", ["model.embedding_dim=48"], "model.embedding_dim is 48, but the CLIP's embeddings have 32 dimensions"),
        ("prior_autoregressive", ["model.embedding_dim=48"], "model.embedding_dim is 48, but the CLIP's embeddings have 32"),
    ],
)
def test_numbers_that_do_not_fit_are_named(clip, tmp_path, stage, settings, message):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a thing")
    with pytest.raises(ConfigError, match=message):
        run_here(stage, tmp_path / "x", f"objective.clip={clip}", f"data.path={tmp_path}", "max_steps=1", *settings)
    assert not (tmp_path / "x").exists()


def test_weights_that_were_made_for_another_clip_are_told_of(clip, plain, tmp_path, capsys):
    other = shutil.copytree(plain / "final", tmp_path / "other")
    path = other / "text_proj" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_fingerprint": "another"}))
    few = (f"objective.clip={clip}", "max_steps=1", "batch_size=2")
    run_here("decoder", tmp_path / "one", *few, f"init_from={other}")
    assert "text_proj was made for the CLIP another, and objective.clip is " in capsys.readouterr().err
    run_here("decoder", tmp_path / "two", *few, f"init_from={plain}")
    assert "was made for" not in capsys.readouterr().err


STOCK = {
    "prior": {"class": "PriorTransformer", "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    | {"embedding_dim": 32, "num_embeddings": karlo.TOKENS},
    "decoder": {
        "class": "UNet2DConditionModel",
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "identity",
    },
    "upsampler_256": {
        "class": "UNet2DModel",
        "sample_size": 32,
        "in_channels": 6,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
        "add_attention": False,
        "resnet_time_scale_shift": "scale_shift",
    },
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder in Karlo's layout."""
    folder = tmp_path_factory.mktemp("karlo")
    UnCLIPPipeline(**karlo.parts(folder)).save_pretrained(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize("stage", ["prior", pytest.param("decoder", marks=pytest.mark.slow), "upsampler_256"])
def test_training_goes_on_from_karlos_networks(stock, tmp_path, stage):
    """At rate zero the networks stay what the folder holds; at a small one they all learn, and go back into a pipeline."""
    config = {"stage": stage, "max_steps": 1, "batch_size": 2, "precision": "no", "workers": 0, "data": {"path": "shapes"}}
    config |= {"model": STOCK[stage], "objective": {"clip": str(stock)}, "init_from": str(stock), "warmup_steps": 0, "ema": 0}
    if stage == "decoder":
        config["objective"] |= {"prediction_type": "epsilon", "timesteps": "uniform", "embedding_noise": 0.0}
    name = stage
    if stage == "upsampler_256":
        name = "super_res_first"
        config["objective"] = {"prediction_type": "epsilon", "loss": "mse", "edges": 0.0}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    from unclip.training.trainer import train

    for rate in (0.0, 1e-3):
        settings = ["validate_every=0", "sample_every=0", f"learning_rate={rate}", f"output_dir={tmp_path / str(rate)}"]
        train(tmp_path / "config.yaml", settings)
    still, moved = component(tmp_path / "0.0", name), component(tmp_path / "0.001", name)
    given = load_file(stock / name / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, given[k]) for k, v in still.state_dict().items())
    changed = [k for k, v in moved.state_dict().items() if not torch.equal(v, given[k])]
    assert len(changed) > len(given) / 2 and not {"clip_mean", "clip_std"} & set(changed)
    pipe = UnCLIPPipeline.from_pretrained(stock, **{name: moved})
    pipe.set_progress_bar_config(disable=True)
    steps = {f"{s}_num_inference_steps": 2 for s in ("prior", "decoder", "super_res")}
    assert torch.isfinite(pipe("a teddy", generator=seeds(0), output_type="pt", **steps).images).all()


@pytest.mark.parametrize("degrade", ["blur", "bsr"])
@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_an_upsampler_is_told_the_noise_that_it_is_given(tmp_path, degrade, kind):
    """Noise conditioning: the label is the noise's standard deviation, of each image its own."""
    model = (
        {"sample_size": 256, "channels": [8], "blocks": [1]}
        if kind == "ours"
        else dict(STOCK["upsampler_256"], sample_size=256)
    )
    model["class_embed_type"] = "timestep"
    found = {
        grain: UpsamplerObjective(model, {"path": "shapes", "crop": 0.25}, 0, grain=grain, degrade=degrade)
        for grain in (0.0, 0.4)
    }
    heard = {}
    for grain, objective in found.items():
        network = objective.trained["super_res_first"]

        def note(_, given, named, grain=grain):
            heard[grain] = (given[0][:, 3:], named["class_labels"])

        network.register_forward_pre_hook(note, with_kwargs=True)
        batch = torch.utils.data.default_collate([objective.examples[n] for n in range(16)])
        batch["random"][:, 1] = torch.linspace(0, 1, 16)
        loss, _ = objective(batch)
        assert loss.isfinite()
        low, _ = objective.low_resolution(batch["image"].float() / 127.5 - 1, batch)
        heard[grain] = (low, heard[grain][1])
    assert not heard[0.0][1].any()
    torch.testing.assert_close(heard[0.4][1], 1000 * torch.linspace(0, 0.4, 16))
    added = (heard[0.4][0] - heard[0.0][0]).flatten(1)
    inside = heard[0.4][0].abs().flatten(1) < 1  # what left [-1, 1] was cut off there
    sizes = [float(row[kept].std()) for row, kept in zip(added, inside, strict=True)]
    assert sizes[0] == 0 and sizes[4] > 0.04 and sizes[-1] > 2 * sizes[4]


def test_an_upsampler_that_is_told_of_noise_goes_on_from_one_that_is_not_and_draws(tmp_path):
    few = ("max_steps=1", "batch_size=2", "ema=0", "warmup_steps=0")
    plain = run_here("upsampler_256", tmp_path / "plain", *few)
    told = run_here(
        "upsampler_256", tmp_path / "told", *few, "learning_rate=0", "model.class_embed_type=timestep", f"init_from={plain}"
    )
    networks = [component(folder, "super_res_first") for folder in (plain, told)]
    sample = torch.randn(1, 6, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(networks[0](sample, 9).sample, networks[1](sample, 9, torch.tensor([50.0])).sample)
    torch.nn.init.normal_(networks[1].class_embedding[-1].weight, std=0.1)
    pipes = [UnCLIPPipeline(**(tiny_networks() | {"super_res_first": n, "upsampler_1024": None})) for n in networks]
    settings = {"size": 256, "output_type": "pt", "prior_num_inference_steps": 2, "decoder_num_inference_steps": 2}
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.to(torch.float32)
    drawn = [pipes[1]("a star", generator=seeds(0), upsampler_noise_level=level, **settings).images for level in (0.0, 0.3)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3 and drawn[1].isfinite().all()
    for level, message in (
        (2, "must be from 0 to 1, got 2"),
        (0.1, "not conditioned on noise: .* must be 0, got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipes[level == 2]("a star", upsampler_noise_level=level, **settings)


def test_trackers_are_told_what_the_log_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_here("upsampler_256", tmp_path, "max_steps=3", "report_to=tensorboard")
    events = EventAccumulator(str(tmp_path / "trackers" / "unclip"))
    events.Reload()
    told = {e.step: e.value for e in events.Scalars("train/loss")}
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert told == pytest.approx({r["step"]: r["loss"] for r in rows}, abs=1e-5) and len(told) == 3


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord' \\(did you mean 'tensorboard'"):
        run_here("upsampler_256", tmp_path / "x", "report_to=tensorbord")


def test_the_emoji_decoders_learn_from_text_from_images_and_from_both():
    """A tenth of the examples at least has one condition alone; with fewer, that way to draw was lost."""
    for name in ("decoder", "decoder_32"):
        found = load_config(ROOT / f"configs/emoji/{name}.yaml")["objective"]
        both, image, text = (found[f"drop_{what}"] for what in ("both", "image", "text"))
        shares = ((1 - both) * image * (1 - text), (1 - both) * text * (1 - image), (1 - both) * (1 - image) * (1 - text))
        assert min(shares) > 0.1 and shares[2] > 0.4 and both > 0
