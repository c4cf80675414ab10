"""Banks of plans: the scenes that a sampler would draw, and batches of them made on a device without text or host reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from unclip.config import ConfigError
from unclip.data import bank_build
from unclip.data.bank import PlanBank, tokenizer_fingerprint
from unclip.data.bank_build import build_bank
from unclip.data.bank_scenes import BankScenes
from unclip.data.examples import EmojiScenes, grounds
from unclip.data.layouts import LAYOUTS
from unclip.data.plans import KIND_WEIGHTS, Scene
from unclip.data.render import Layer
from unclip.data.scenes import SceneSampler, is_everyday
from unclip.objectives.frozen_clip import FrozenCLIP
from unclip.runtime.random import scalars

COUNT = 400
DATA = {"path": "shapes", "contrast": 0.3, "loose": 0.2}
ONE_POSE = {"path": "shapes", "single_pose": True}
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
    return build_bank(DATA, tokenizer, COUNT, seed=3)


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


def layers_of(scenes: BankScenes, indices: Tensor) -> list[list[Layer]]:
    icon, other, layout, matrix, *_ = scenes.plans[indices % len(scenes.plans)].long().unbind(1)
    layers = scenes._layers(indices, scalars(scenes.seed, indices), torch.stack([icon, other], 1), layout, matrix)
    rows = zip(*(t.tolist() for t in (layers.icons, layers.x, layers.y, layers.size)), strict=True)
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
    for number in range(COUNT):
        assert bank.plan(number) == examples.sampler.planned(number)[0]
    assert {bank.plan(number).kind for number in range(COUNT)} == set(KIND_WEIGHTS)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("all_concepts", [False, True])
def test_held_out_combinations_stay_held_out(tokenizer, split, all_concepts):
    held = build_bank(DATA | {"all_concepts": all_concepts}, tokenizer, 150, split)
    assert {held.plan(number).split(all_concepts) for number in range(150)} == {split}


def test_keys_are_equal_where_meanings_are(bank, wanted):
    pairs = set(zip(bank.keys().tolist(), wanted["key"].tolist(), strict=True))
    assert len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs}) > 100


def test_a_bank_is_the_same_with_any_number_of_processes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_build, "_CHUNK", 32)
    for name, processes in (("one", 1), ("again", 1), ("two", 2)):
        build_bank(DATA, tokenizer, 100, seed=3, processes=processes).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes() == (tmp_path / "two").read_bytes()


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
    with pytest.raises(ConfigError, match=r"old\.npz is a plan bank of format 0, not 1"):
        PlanBank.load(tmp_path / "old.npz")


def test_other_sprites_are_refused(bank, examples):
    with pytest.raises(ConfigError, match="was made with the sprites"):
        BankScenes(bank, examples.icons.sprites[::-1])


def test_own_pictures_are_refused(tokenizer, tmp_path):
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


def test_names_are_marked_as_the_frozen_clip_marks_them(batch, wanted, frozen):
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


def test_captions_that_are_cut_keep_the_names_that_are_left(tokenizer, frozen):
    short = type(tokenizer).from_pretrained(tokenizer.name_or_path, model_max_length=6)
    some = build_bank(DATA, short, 100, seed=3)
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
    kinds = [one_pose.plan(index).kind for index in range(200)]
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
    """Quantiles of 200 layouts of one plan by the sampler and by the bank, of every kind."""
    index = int((bank.layouts == number).argmax())
    plan, left = bank.plan(index), LAYOUTS[number].spots[0][0] < LAYOUTS[number].spots[-1][0]
    sampler = SceneSampler(examples.icons, "train", single_pose=single_pose)
    drawn = [sampler.lay_out(plan, np.random.default_rng(n)).layers for n in range(500)]
    drawn = [layers for layers in drawn if plan.kind != "pair" or (layers[0].x < layers[1].x) == left][:200]
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
    assert (width.max() == 0) == (single_pose and len(made[0]) == 1)


def test_grounds_are_those_of_the_words_and_move_a_little(bank, batch):
    """The corner of an image is its ground: white, or the colour that the plan names, at most 10 of 255 off."""
    from unclip.data.render import BACKGROUNDS

    corners = batch["image"][:, :, 0, 0].short()
    named = {index: bank.plan(index).background for index in range(COUNT)}
    of_single = [index for index, ground in named.items() if bank.plan(index).kind in ("count", "pair", "relation")]
    assert (corners[of_single] == 255).all()
    coloured = [index for index, ground in named.items() if ground and batch["sides"][index].abs().sum() == 0]
    off = corners[coloured] - torch.tensor([BACKGROUNDS[named[index]] for index in coloured])
    clear = off.abs().amax(1) <= 10
    assert clear.float().mean() > 0.8  # a few icons reach the corner
    assert len(off[clear].unique()) > 10


def test_sides_are_those_of_the_layers(bank, scenes, batch, wanted):
    """As `EmojiScenes` finds them of the scene that was laid out."""
    layers = layers_of(scenes, INDICES)
    for index in range(COUNT):
        plan = bank.plan(index)
        names = tuple(name for name in wanted["caption"][index : index + 1] if wanted["rows"][index, 1] >= 0)
        if not names:
            assert not batch["sides"][index].any()
            continue
        spans = wanted["spans"][index].tolist()
        spelt = tuple(wanted["caption"][index][start:end] for start, end in spans)
        scene = Scene(plan.kind, plan.key, plan.style, wanted["caption"][index], spelt, tuple(layers[index]))
        assert torch.equal(batch["sides"][index], grounds(scene)["sides"])


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
    data = {"path": "data/emoji", "all_concepts": True, "loose": 0.3, "words": 0.3}
    examples = EmojiScenes(**data)
    made = build_bank(data, tokenizer, 20_000)
    made.save(tmp_path / "bank.npz")
    assert (tmp_path / "bank.npz").stat().st_size < 20 * 20_000
    assert all(made.plan(number).split(True) == "train" for number in range(20_000))
    assert any(made.tone(number) for number in range(20_000))
    pairs = {(key, examples.sampler.scene(number).key) for number, key in enumerate(made.keys()[:2000].tolist())}
    assert len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs})
