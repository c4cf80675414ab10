"""Banks of plans: the scenes that a sampler would draw, and batches of them made on a device without text or host reads."""

import gzip
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from unclip.data import bank_build
from unclip.data.attachments import Attachments
from unclip.data.bank import PlanBank, tokenizer_fingerprint
from unclip.data.bank_build import build_bank
from unclip.data.bank_scenes import BankScenes
from unclip.data.compositor import Layers
from unclip.data.examples import EmojiScenes, _grounding
from unclip.data.icon_packages import STYLES
from unclip.data.layouts import FIT_SHIFT, FIT_SIZES, LAYOUTS, MAX_LAYERS, layout_of
from unclip.data.plans import KIND_WEIGHTS, OPTIONAL_KINDS
from unclip.data.render import BACKGROUNDS, GROUNDS, Layer
from unclip.data.scenes import SceneSampler, is_everyday
from unclip.runtime.config import ConfigError
from unclip.training.objectives.frozen_clip import FrozenCLIP

COUNT = 600
KINDS = KIND_WEIGHTS | OPTIONAL_KINDS
DATA = {"path": "shapes", "contrast": 0.3, "loose": 0.2, "sentences": 0.2, "kinds": KINDS}
ONE_POSE = {"path": "shapes", "single_pose": True}
ATTACHABLE = (
    *("dog face", "cat face", "dog", "horse", "panda", "owl", "crown", "top hat", "sunglasses", "glasses", "basket", "banana"),
    *("red apple", "bowl with spoon", "key", "star", "bicycle", "canoe", "billed cap", "ribbon"),
)
INDICES = torch.arange(COUNT)


@pytest.fixture(scope="module")
def frozen(tiny_folder) -> FrozenCLIP:
    return FrozenCLIP.load(str(tiny_folder))


@pytest.fixture(scope="module")
def tokenizer(frozen):
    return frozen.clip.tokenizer


@pytest.fixture(scope="module")
def examples() -> EmojiScenes:
    return EmojiScenes(**DATA, seed=3)


@pytest.fixture(scope="module")
def bank(tokenizer) -> PlanBank:
    return build_bank(DATA, tokenizer, COUNT, ("train", 3))


@pytest.fixture(scope="module")
def scenes(bank, examples) -> BankScenes:
    return BankScenes(bank, examples.icons.sprites, seed=3)


@pytest.fixture(scope="module")
def batch(scenes) -> dict[str, Tensor]:
    return scenes.batch(INDICES)


@pytest.fixture(scope="module")
def wanted(examples) -> dict[str, Tensor]:
    """The examples of the same indices that data workers would make."""
    return default_collate([examples[index] for index in range(COUNT)])


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> str:
    """A dataset of icons that can be attached to each other, drawn as plain boxes of a colour and extent of their own."""
    rng, folder, icons, sprites = np.random.default_rng(0), tmp_path_factory.mktemp("boxes"), [], []
    for concept in ATTACHABLE:
        for style in STYLES:
            sprites.append(np.zeros((64, 64, 4), np.uint8))
            (left, top), (right, bottom) = rng.integers(2, 12, 2), rng.integers(52, 62, 2)
            sprites[-1][top:bottom, left:right] = (*rng.integers(0, 200, 3), 255)
            facts = {"concept": concept, "group": "objects", "style": style, "tone": "", "tags": [], "svg": ""}
            icons.append(facts | {"colours": ["red", "blue"]})
    (folder / "icons.json.gz").write_bytes(gzip.compress(json.dumps(icons).encode()))
    np.save(folder / "sprites-64.npy", np.stack(sprites))
    return str(folder)


def layers_of(scenes: BankScenes, indices: Tensor) -> list[list[Layer]]:
    """The layers that `scenes` draws for these indices, without their colours."""
    composed = []

    def keep(atlas: Tensor, layers: Layers, *rest: object) -> Tensor:
        composed.append(layers)
        return torch.zeros(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip.data.bank_scenes.compose", keep)
        scenes(indices)
    rows = zip(*(t.tolist() for t in (composed[0].icons, composed[0].x, composed[0].y, composed[0].size)), strict=True)
    return [[Layer(*facts) for facts in zip(*row, strict=True) if facts[0] >= 0] for row in rows]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if name == "image":
            assert (tensor.short() - expected[name].short()).abs().max() <= 1
        else:
            assert torch.equal(tensor, expected[name]), name


# ---------------------------------------------------------------------------------------------- plans


def test_plans_are_those_of_the_sampler(bank, examples):
    plans = bank.plans()
    assert plans == [examples.sampler.planned(number)[0] for number in range(COUNT)]
    assert {plan.kind for plan in plans} == set(KINDS)
    assert any(plan.colours for plan in plans) and any(plan.background in GROUNDS for plan in plans)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("all_concepts", [False, True])
def test_held_out_combinations_stay_held_out(tokenizer, split, all_concepts):
    held = build_bank(DATA | {"all_concepts": all_concepts}, tokenizer, 150, (split, 0))
    assert {plan.split(all_concepts) for plan in held.plans()} == {split}


def test_keys_are_equal_where_meanings_are(bank, wanted):
    pairs = set(zip(bank.keys().tolist(), wanted["key"].tolist(), strict=True))
    assert len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs}) > 100


def test_a_bank_is_the_same_with_any_number_of_processes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_build, "_CHUNK", 32)
    for name, processes in (("one", 1), ("again", 1), ("two", 2)):
        build_bank(DATA, tokenizer, 100, ("train", 3), processes=processes).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_process_that_dies_is_no_endless_wait(tokenizer, monkeypatch):
    monkeypatch.setattr(bank_build, "_start_worker", os.abort)
    with pytest.raises(RuntimeError, match="a process that makes plans has ended early"):
        build_bank(DATA, tokenizer, 100, ("train", 3), processes=2)


def test_it_comes_back_from_disk(bank, tmp_path):
    bank.save(tmp_path / "bank.npz")
    found = PlanBank.load(tmp_path / "bank.npz")
    assert found.facts == bank.facts
    for name, array in vars(bank).items():
        if name != "facts":
            assert getattr(found, name).dtype == array.dtype
            np.testing.assert_array_equal(getattr(found, name), array)
    assert (tmp_path / "bank.npz").stat().st_size / COUNT < 40  # bytes, of which the tables of icons are most


def test_what_is_no_bank_is_named(bank, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no plan bank at .*none\.npz; `unclip data bank` makes one"):
        PlanBank.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no bank")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    bank.save(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-100])
    for name in ("text.npz", "other.npz", "cut.npz"):
        with pytest.raises(ConfigError, match=f"{name} is no plan bank, or damaged"):
            PlanBank.load(tmp_path / name)
    monkeypatch.setattr("unclip.data.bank.FORMAT", 0)
    bank.save(tmp_path / "old.npz")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"old\.npz is a bank of format 0, not 1"):
        PlanBank.load(tmp_path / "old.npz")


def test_other_sprites_are_refused(bank, examples):
    with pytest.raises(ConfigError, match="was made with the sprites"):
        BankScenes(bank, examples.icons.sprites[::-1])


def test_own_images_are_refused(tokenizer, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(ConfigError, match="holds no emoji scenes"):
        build_bank({"path": str(tmp_path)}, tokenizer, 10)
    with pytest.raises(ValueError, match="at least 1 plan, got 0"):
        build_bank(DATA, tokenizer, 0)


# ---------------------------------------------------------------------------------------------- captions


def test_tokens_are_those_of_the_captions(batch, wanted, tokenizer):
    spelt = tokenizer(wanted["caption"], padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    length = batch["tokens"].shape[1]
    assert length % 4 == 0
    assert torch.equal(batch["tokens"], spelt.input_ids[:, :length])
    assert torch.equal(batch["mask"], spelt.attention_mask[:, :length].bool())
    assert not spelt.attention_mask[:, length:].any()


def test_name_tokens_are_those_of_the_frozen_clip(batch, wanted, frozen):
    marked = frozen.tokens_of(wanted["caption"], wanted["spans"])
    assert torch.equal(batch["names"], marked[:, : batch["names"].shape[1]])
    assert {-1, 0, 1} == set(batch["names"].unique().tolist())


@pytest.mark.parametrize("name", ["index", "rows", "style", "caption_style", "icon"])
def test_facts_are_those_of_the_examples(batch, wanted, name):
    assert torch.equal(batch[name], wanted[name])
    assert batch[name].dtype == wanted[name].dtype


def test_a_batch_has_what_collated_examples_have(batch, wanted):
    assert set(batch) == set(wanted) - {"caption", "spans"} | {"tokens", "mask", "names"}
    for name in set(batch) & set(wanted):
        assert batch[name].dtype == wanted[name].dtype and batch[name].shape == wanted[name].shape


def test_boxes_and_layers_are_what_is_composed(scenes, batch):
    for row, layers in enumerate(layers_of(scenes, torch.as_tensor(INDICES))):
        assert batch["layers"][row].tolist() == [layer.icon for layer in layers] + [-1] * (MAX_LAYERS - len(layers))
        places = [[layer.x, layer.y, layer.size] for layer in layers]
        torch.testing.assert_close(batch["boxes"][row, : len(layers)], torch.tensor(places))
        assert not batch["boxes"][row, len(layers) :].any()
        assert not batch["recoloured"][row, len(layers) :].any()
    corner = batch["image"][:, :, 0, 0].float() / 127.5 - 1
    empty = (batch["boxes"][..., :2] - batch["boxes"][..., 2:] / 2 > 0.02).all(-1) | (batch["layers"] < 0)
    shown = empty.all(1)  # no layer reaches the corner
    assert shown.any()
    torch.testing.assert_close(batch["background"][shown], corner[shown], atol=0.01, rtol=0)


def test_captions_that_are_cut_keep_the_names_that_are_left(tokenizer, frozen):
    short = type(tokenizer).from_pretrained(tokenizer.name_or_path, model_max_length=6)
    some = build_bank(DATA, short, 100, ("train", 3))
    assert some.lengths.max() == 6
    found = BankScenes(some, EmojiScenes(**DATA).icons.sprites).batch(range(100))
    items = default_collate([EmojiScenes(**DATA, seed=3)[index] for index in range(100)])
    marked = frozen.tokens_of(items["caption"], items["spans"])[:, :6]
    cut = (marked != 0) & found["mask"][:, :6]
    marked[:, 5] = 0  # the last of six ends the text
    assert torch.equal(found["names"][:, :6] * cut, marked * cut)
    assert torch.equal(found["rows"], items["rows"])


def test_no_caption_is_an_everyday_prompt(bank, tokenizer):
    ends = bank.lengths.cumsum(dtype=np.int64)
    texts = [
        tokenizer.decode(bank.tokens[end - n : end], skip_special_tokens=True)
        for n, end in zip(bank.lengths, ends, strict=True)
    ]
    assert not any(map(is_everyday, texts))


def test_the_empty_caption_and_the_tokens_in_use(bank, scenes, tokenizer, batch):
    tokens, mask = scenes.empty(2)
    assert tokens[mask].tolist() == tokenizer("").input_ids * 2
    assert tokens.shape == mask.shape == (2, batch["tokens"].shape[1])
    assert set(torch.cat([batch["tokens"], tokens]).unique().tolist()) == set(bank.used_tokens().tolist())
    assert bank.facts["tokenizer"] == tokenizer_fingerprint(tokenizer)


# ---------------------------------------------------------------------------------------------- images


def test_one_pose_draws_what_the_examples_draw(tokenizer):
    one_pose = build_bank(ONE_POSE, tokenizer, 200)
    examples = EmojiScenes(**ONE_POSE)
    found = BankScenes(one_pose, examples.icons.sprites).batch(range(200))
    kinds = [plan.kind for plan in one_pose.plans()]
    alone = [index for index, kind in enumerate(kinds) if kind in ("single", "colour", "size")]
    assert {kinds[index] for index in alone} == {"single", "colour", "size"} and (one_pose.matrices != 0).any()
    wanted = torch.stack([examples[index]["image"] for index in alone])
    assert (found["image"][alone].short() - wanted.short()).abs().max() <= 1


def test_single_icons_in_one_pose_are_one_image_each(tokenizer):
    one_pose = build_bank(ONE_POSE | {"kinds": ["single"]}, tokenizer, 50)
    icons = EmojiScenes(**ONE_POSE).icons
    scenes = BankScenes(one_pose, icons.sprites)
    found = scenes.batch(range(1000, 1050))
    assert torch.equal(found["image"], scenes.single_images(found["icon"]))
    drawn = (icons.in_pose(found["icon"].tolist()) * 255).round()
    assert (found["image"].short() - drawn).abs().max() <= 1
    moved = BankScenes(one_pose, icons.sprites, single_pose=False).batch(range(50))["image"]
    assert (moved != scenes.batch(range(50))["image"]).flatten(1).any(1).all()


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
@pytest.mark.parametrize("single_pose", [False, True])
def test_places_and_sizes_spread_as_the_sampler_spreads_them(bank, examples, number, single_pose):
    """Quantiles of 200 layouts of one plan by the sampler and by the bank, of every layout."""
    index, layout = int((bank.layouts == number).argmax()), LAYOUTS[number]
    assert bank.layouts[index] == number
    plan, sampler = bank.plans()[index], SceneSampler(examples.icons, "train", single_pose=single_pose)
    drawn = (sampler.lay_out(plan, np.random.default_rng(n)).layers for n in range(3000))
    drawn = list(itertools.islice((layers for layers in drawn if layout_of(plan, layers) == number), 200))
    scenes = BankScenes(bank, examples.icons.sprites, seed=1, single_pose=single_pose)
    made = layers_of(scenes, torch.arange(index, index + 200 * COUNT, COUNT))
    assert [layer.icon for layer in made[0]] == [layer.icon for layer in drawn[0]]
    at = torch.linspace(0, 1, 5, dtype=torch.float64)
    ours, theirs = (
        torch.tensor([[(layer.x, layer.y, layer.size) for layer in layers] for layers in of], dtype=torch.float64).quantile(
            at, 0
        )
        for of in (made, drawn)
    )
    width = theirs[-1] - theirs[0]
    assert ((ours - theirs).abs() <= 0.2 * width + 1e-6).all()
    assert (width.max() == 0) == (single_pose and layout.posed)


def test_attachments_keep_their_places_and_fill_the_image_as_the_sampler_lets_them(tokenizer, boxes):
    data = {"path": boxes, "kinds": ["attachment"]}
    examples, attached = EmojiScenes(**data), build_bank(data, tokenizer, 300)
    plans = [examples.sampler.planned(index)[0] for index in range(300)]
    assert attached.plans() == plans
    assert {"wearing", "riding", "inside", "holding", "face"} <= {plan.relation for plan in plans}
    assert {len(plan.concepts) for plan in plans} == {2, 3}
    extent = Attachments(examples.icons, []).extent
    found = []
    for made, index in zip(
        layers_of(BankScenes(attached, examples.icons.sprites), torch.arange(600)), itertools.cycle(range(300))
    ):
        scene = examples.sampler.scene(index)
        assert [layer.icon for layer in made] == [layer.icon for layer in scene.layers]
        ours, theirs = (np.array([(layer.x, layer.y, layer.size) for layer in of]) for of in (made, scene.layers))
        scale = ours[0, 2] / theirs[0, 2]
        np.testing.assert_allclose(ours - ours[0], scale * (theirs - theirs[0]), atol=1e-3)
        drawn = np.array([extent(layer.icon) for layer in made]) * ours[:, 2:] + np.tile(ours[:, :2] - ours[:, 2:] / 2, 2)
        low, high = drawn[:, :2].min(0), drawn[:, 2:].max(0)
        found.append((*(low + high) / 2, (high - low).max()))
    found = np.array(found)
    bounds = np.array([(0.5 - FIT_SHIFT, 0.5 + FIT_SHIFT)] * 2 + [FIT_SIZES]).T
    assert (found.min(0) >= bounds[0] - 1e-3).all() and (found.max(0) <= bounds[1] + 1e-3).all()
    assert (np.ptp(found, axis=0) > 0.9 * (bounds[1] - bounds[0])).all()


def test_backgrounds_have_the_captions_colours_with_jitter(bank, batch):
    """The corner of an image is its ground: white, or the colour that the plan names, at most 10 of 255 off."""
    corners = batch["image"][:, :, 0, 0].short()
    plans = bank.plans()
    assert all((corners[index] == 255).all() for index, plan in enumerate(plans) if plan.kind in ("count", "pair", "relation"))
    named = [index for index, plan in enumerate(plans) if plan.kind in ("background", "ground")]
    off = corners[named] - torch.tensor([(BACKGROUNDS | GROUNDS)[plans[index].background] for index in named])
    clear = off.abs().amax(1) <= 10
    assert clear.float().mean() > 0.8  # a few icons reach the corner
    assert len(off[clear].unique()) > 10


def sides_of(examples: EmojiScenes, bank: PlanBank, made: list[list[Layer]]) -> Tensor:
    """Of the sampler's scenes with the layers that were made in place of theirs, as `EmojiScenes` finds them."""
    found = []
    for index, layers in enumerate(made):
        scene = examples.sampler.scene(index)
        layers = [replace(layer, matrix=old.matrix) for layer, old in zip(layers, scene.layers, strict=True)]
        found.append(_grounding(replace(scene, layers=tuple(layers)), examples.icons)["sides"])
    return torch.stack(found)


def test_sides_are_those_of_the_layers(bank, scenes, batch, examples, boxes, tokenizer):
    assert torch.equal(batch["sides"], sides_of(examples, bank, layers_of(scenes, INDICES)))
    attached = build_bank({"path": boxes, "kinds": ["attachment"]}, tokenizer, 100)
    of_boxes = EmojiScenes(boxes, kinds=["attachment"])
    making = BankScenes(attached, of_boxes.icons.sprites)
    sides = making.batch(range(100))["sides"]
    assert torch.equal(sides, sides_of(of_boxes, attached, layers_of(making, torch.arange(100))))
    assert {-1, 0, 1} == set(sides.unique().tolist())


def test_images_are_those_of_the_layers_in_their_colours(bank, scenes, batch, examples):
    made = layers_of(scenes, INDICES)
    for index, plan in enumerate(bank.plans()):
        if plan.background:
            continue
        scene = examples.sampler.scene(index)
        layers = [replace(layer, matrix=old.matrix) for layer, old in zip(made[index], scene.layers, strict=True)]
        wanted = examples.icons.pixels(replace(scene, layers=tuple(layers)))
        assert (batch["image"][index].permute(1, 2, 0).short() - torch.from_numpy(wanted).short()).abs().max() <= 1


# ---------------------------------------------------------------------------------------------- batches


def test_any_split_makes_the_same_examples(scenes, batch):
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:64]
    expected = {name: tensor[order] for name, tensor in batch.items()}
    same(scenes.batch(order), expected)
    alone = [scenes.batch([index]) for index in order.tolist()]
    same({name: torch.cat([one[name] for one in alone]) for name in batch}, expected)


def test_each_pass_shows_the_plans_otherwise(scenes, batch):
    later = scenes.batch(INDICES + COUNT)
    for name in ("tokens", "mask", "names", "rows", "style", "key", "icon", "caption_style"):
        assert torch.equal(later[name], batch[name])
    assert (later["image"] != batch["image"]).flatten(1).any(1).all()
    assert not torch.equal(later["random"], batch["random"])


def test_another_seed_moves_the_same_plans(scenes, bank, examples, batch):
    other = BankScenes(bank, examples.icons.sprites, seed=4).batch(INDICES)
    assert torch.equal(other["tokens"], batch["tokens"])
    assert (other["image"] != batch["image"]).flatten(1).any(1).all()


def test_a_compiled_graph_makes_the_same_batch_without_a_break(scenes, batch):
    compiled = torch.compile(scenes, backend="eager", fullgraph=True)
    same(compiled(INDICES), batch)


@pytest.mark.slow
def test_a_compiled_kernel_makes_the_same_batch(scenes, batch):
    same(torch.compile(scenes, fullgraph=True)(INDICES), batch)


def test_nothing_is_read_back_to_the_host(bank, examples):
    meta = BankScenes(bank, examples.icons.sprites).to("meta")  # it has no values to read
    made = meta(INDICES.to("meta"))
    assert all(tensor.is_meta for tensor in made.values())


@pytest.mark.gpu
def test_a_gpu_makes_the_same_batch_without_waiting(bank, examples, batch, exact):
    scenes = BankScenes(bank, examples.icons.sprites, seed=3)
    scenes.batch(INDICES, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = scenes.batch(INDICES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same({name: tensor.cpu() for name, tensor in found.items()}, batch)
    compiled = torch.compile(scenes, fullgraph=True)(INDICES.cuda())
    same({name: tensor.cpu() for name, tensor in compiled.items()}, batch)


def test_reading_a_bank_needs_nothing_that_captions_are_written_with(run):
    code = "import sys, unclip.data.bank_scenes; sys.exit('inflect' in sys.modules or 'datasets' in sys.modules)"
    assert run("-c", code).returncode == 0


# ---------------------------------------------------------------------------------------------- command


def test_the_command_writes_a_bank(command, tiny_folder, tmp_path, bank):
    out = tmp_path / "bank.npz"
    words = ("data", "bank", "configs/tiny/decoder.yaml", "data.path=shapes", "seed=3", "--out", out, "--plans", "60")
    code, said, _ = command(*words, "--model", tiny_folder, "--processes", "1")
    assert code == 0 and said.startswith("60 plans, ")
    found = PlanBank.load(out)
    assert len(found) == 60 and found.facts["seed"] == 3
    code, _, error = command(*words, "--model", tiny_folder)
    assert code == 2 and "exists already" in error and "--force" in error
    code, _, error = command(*words, "--plans", "0", "--force")
    assert code == 2 and "plans must be at least 1, got 0" in error


@pytest.mark.slow
@pytest.mark.skipif(not Path("data/emoji/icons.json.gz").exists(), reason="built by `unclip data emoji`")
def test_a_bank_of_emoji_is_small_and_holds_out_what_it_should(tokenizer, tmp_path):
    data = {"path": "data/emoji", "all_concepts": True, "loose": 0.3, "words": 0.3, "sentences": 0.2, "kinds": KINDS}
    examples = EmojiScenes(**data)
    made = build_bank(data, tokenizer, 20_000)
    made.save(tmp_path / "bank.npz")
    assert (tmp_path / "bank.npz").stat().st_size < 20 * 20_000
    assert {plan.split(True) for plan in made.plans()} == {"train"}
    assert any(made.tones())
    pairs = {(key, examples.sampler.scene(number).key) for number, key in enumerate(made.keys()[:2000].tolist())}
    assert len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs})
