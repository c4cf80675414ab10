"""What is asked: splits apart, combinations held out, everyday prompts never trained on."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

import unclip.data
from unclip.clip import characters
from unclip.data.scenes import IconSet, SceneSampler, everyday_prompts, is_everyday, split_of_concept, split_of_icon
from unclip.data.words import Vocabulary, Words
from unclip.evaluation import prompts as prompt_sets

DATA = Path(unclip.data.__file__).parent


@pytest.fixture(scope="module")
def icons() -> IconSet:
    return IconSet.load("shapes")


@pytest.fixture(scope="module")
def compositions(icons) -> dict[str, dict[str, list[prompt_sets.Prompt]]]:
    return {split: prompt_sets.composition(icons, split, 8) for split in prompt_sets.SPLITS}


def test_dev_and_test_share_no_prompt(icons, compositions):
    dev, test = ({p.text for p in prompt_sets.recognition(icons, s)} for s in ("dev", "test"))
    assert dev and test and not dev & test and dev | test == set(icons.recognisable)
    dev, test = compositions["dev"], compositions["test"]
    for kind in dev:
        assert not {p.text for p in dev[kind]} & {p.text for p in test[kind]}
    assert sum(map(len, dev.values())) > 20
    with pytest.raises(ValueError, match="dev or test, got 'train'"):
        prompt_sets.recognition(icons, "train")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_combinations_are_held_out_and_their_parts_are_not(icons, compositions, split):
    for kind, prompts in compositions[split].items():
        for prompt in prompts:
            assert prompt.plan.split() == prompt_sets.SPLITS[split]
            assert all(split_of_concept(c) == "train" for c in prompt.plan.concepts)
            if kind != "style":
                assert all(split_of_icon(c, prompt.plan.style) == "train" for c in prompt.plan.concepts)
            assert len(prompt.truth.layers) == len(prompt.plan.concepts) * prompt.plan.count
            for question in prompt_sets.questions(prompt, icons):
                assert len(set(question.captions)) == len(question.captions) > 1
                if question.about.endswith(" object"):
                    assert question.options[0].concepts == prompt.plan.concepts and not question.options[0].relation
                elif kind != "pair":
                    assert question.captions[0] == prompt.text


def test_prompts_are_the_same_on_every_call_and_a_limit_takes_the_first(icons, compositions):
    assert prompt_sets.recognition(icons, "dev") == prompt_sets.recognition(icons, "dev")
    assert prompt_sets.recognition(icons, "dev", 0) == prompt_sets.recognition(icons, "dev")
    assert prompt_sets.composition(icons, "dev", 2)["pair"] == compositions["dev"]["pair"][:2]
    assert prompt_sets.scenes(icons, "test", 6)[4:] == prompt_sets.scenes(icons, "test", 2, first=4)


def test_each_turn_shows_the_same_names_by_other_renders(icons):
    turns = [prompt_sets.recognition(icons, "dev", turn) for turn in range(3)]
    for again in zip(*turns, strict=True):
        assert len({(p.text, p.right, p.known) for p in again}) == 1
        assert len({p.truth.style for p in again}) == min(3, len(icons.by_concept[again[0].text]))
        assert len({str(p.truth) for p in again}) == 3, "laid out anew too"


def test_everyday_prompts_are_fixed():
    """The list was committed before any weights were trained against it; half of it is dev, half test."""
    content = (DATA / "everyday.yaml").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "a7be1d51f5904f31ce4d8a3b66f25d98b22066efcc695c1ae2b83e2cb4a00e53"
    prompts = list(everyday_prompts())
    lines = [line for line in content.decode().splitlines() if not line.startswith("#")]
    assert len(prompts) == len(lines) == 300, "no prompt stands twice"
    assert prompts[::100] == ["kitty", "happy face", "rubber ducky"]


def test_everyday_prompts_accept_concepts_that_an_image_can_be_told_by():
    """Every accepted concept is an emoji's name (of the dataset's own), and no such name is itself an everyday prompt."""
    names = list(characters.names().values())
    assert len(names) == 1911
    icons = [
        {"concept": name, "group": "flags" if "flag" in name else "objects", "style": "flat", "tone": ""} for name in names
    ]
    known = dataclasses.replace(IconSet.load("shapes"), icons=icons).recognisable
    wrong = {prompt: set(right) - set(known) for prompt, right in everyday_prompts().items()}
    assert not {prompt: concepts for prompt, concepts in wrong.items() if concepts}
    assert all(right and len(set(right)) == len(right) for right in everyday_prompts().values())
    assert not [name for name in names if is_everyday(name)]


def test_no_sampled_caption_is_an_everyday_prompt():
    """However tags and other words say them: 4,000 captions of icons that are called by nothing else."""
    prompts = list(everyday_prompts())
    plain = IconSet.load("shapes")
    parts = np.array_split(prompts, len(plain.concepts))
    tags = {c: [str(p) for p in part] for c, part in zip(plain.concepts, parts, strict=True)}
    icons = dataclasses.replace(plain, icons=[icon | {"tags": tags[icon["concept"]]} for icon in plain.icons])
    icons.words = Vocabulary({c: Words(names=tags[c], heard=tags[c]) for c in icons.concepts})
    sampler = SceneSampler(icons, "train", loose=0.5, words=0.5)
    said = [sampler.scene(n).caption for n in range(4000)]
    assert not [caption for caption in said if is_everyday(caption)]
    assert any(prompt in caption for caption in said for prompt in prompts), "they come among other words"


def test_everyday_prompts_are_never_trained_on():
    """A dataset whose tags say "kitty" and "bike" never says them alone, and still says its other tags."""
    plain = IconSet.load("shapes")
    tagged = [dict(i, tags=["kitty", "bike", "twinkle"]) if i["concept"] == "star" else i for i in plain.icons]
    icons = dataclasses.replace(plain, icons=tagged)
    assert icons.synonyms["star"] == ["twinkle"]
    scenes = [SceneSampler(icons, "train", seed=s, kinds=("single",)).scene(n) for s in range(2) for n in range(150)]
    said = [scene.caption for scene in scenes]
    said += [caption for row in range(len(icons)) for caption in icons.captions(row)]
    assert not [caption for caption in said if is_everyday(caption)]
    assert any("twinkle" in caption for caption in said)


def test_a_concept_that_is_an_everyday_prompt_would_be_told_otherwise():
    for said in (
        "Kitty",
        "a kitty",
        "an emoji of a kitty",
        "kitty emoji",
        "kitty in noto style",
        "3d style, kitty",
        "My phone",
    ):
        assert is_everyday(said), said
    for said in ("a cat", "two kitty", "a red kitty", "phone"):
        assert not is_everyday(said), said
