"""Attachments recognised by the most similar render."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from boxes import box_icons
from evaluated import Comparing

from unclip.data.attachments import WEIGHTS, Attachments
from unclip.data.plans import Plan
from unclip.data.scenes import IconSet, SceneSampler, split_of_icon
from unclip.evaluation import prompts as prompt_sets
from unclip.evaluation.attachment_detector import QUESTIONS, AttachmentDetector
from unclip.evaluation.context import EvaluationContext
from unclip.evaluation.parts.attachments import measure


@pytest.fixture(scope="module")
def boxes() -> IconSet:
    return box_icons()


@pytest.fixture(scope="module")
def detector(boxes) -> AttachmentDetector:
    return AttachmentDetector(Comparing(), boxes)


def image(icons: IconSet, plan: Plan, seed: int = 9) -> torch.Tensor:
    scene = SceneSampler(icons, "all", tones=0.0).lay_out(plan, np.random.default_rng(seed))
    return torch.from_numpy(icons.pixels(scene)).permute(2, 0, 1)


CASES = (
    ("cat face", "crown", "wearing"),
    ("dog face", "sunglasses", "wearing"),
    ("horse", "owl", "riding"),
    ("bowl with spoon", "red apple", "inside"),
    ("penguin", "rose", "holding"),
    ("teddy bear", "panda", "face"),
    ("key", "star", "badge"),
)


def test_a_true_render_is_right_and_others_are_not(boxes, detector):
    """Of others at most one in ten is taken for right: boxes can look alike where one covers the other."""
    wrong = []
    for base, thing, relation in CASES:
        plan = Plan("attachment", (base, thing), "flat", relation=relation)
        other = next(c for c in Attachments(boxes, boxes.concepts).alternatives(plan, 0))
        others = [Plan("pair", (base, thing), "flat"), Plan("single", (base,), "flat"), Plan("single", (thing,), "flat")]
        others.append(replace(plan, concepts=(other, thing)))
        found, chance = detector.answers([image(boxes, p) for p in (plan, *others)], plan)
        answers = [all(found[about][n] for about in QUESTIONS) for n in range(5)]
        assert answers[0], (base, thing, found)
        assert all(0 < chance[about] < 0.9 for about in QUESTIONS)
        wrong += answers[1:]
    assert len(wrong) == 4 * len(CASES) and sum(wrong) <= 0.1 * len(wrong)


def test_an_image_may_be_larger_and_of_another_style(boxes, detector):
    plan = Plan("attachment", ("cat face", "top hat"), "noto", relation="wearing")
    shown = image(boxes, replace(plan, style="twemoji"))
    large = shown.repeat_interleave(4, 1).repeat_interleave(4, 2)
    found, _ = detector.answers([shown, large], plan)
    assert all(found[about] == [True, True] for about in QUESTIONS)


def test_prompts_are_of_combinations_held_out_of_training(boxes):
    splits = {split: prompt_sets.attachments(boxes, split, 30) for split in prompt_sets.SPLITS}
    assert not {p.text for p in splits["dev"]} & {p.text for p in splits["test"]}
    for split, prompts in splits.items():
        assert len(prompts) > 10
        assert len({p.plan.relation for p in prompts}) > 3 and {p.plan.relation for p in prompts} <= set(WEIGHTS)
        for prompt in prompts:
            assert prompt.plan.split() == prompt_sets.SPLITS[split] and len(prompt.plan.concepts) == 2
            assert {split_of_icon(c, prompt.plan.style) for c in prompt.plan.concepts} == {"train"}


def test_the_part_counts_what_is_right(boxes, tmp_path):
    class StoredSamples(EvaluationContext):
        """Samples real renders for every other prompt, and noise for the rest."""

        def sample(self, name: str, prompts: list[prompt_sets.Prompt], **more) -> torch.Tensor:
            images = self.real_renders(prompts)
            images[1::2] = torch.randint(0, 256, images[1::2].shape, generator=torch.Generator().manual_seed(0)).byte()
            return images

    part = measure(StoredSamples(None, Comparing(), boxes, None, "dev", limit=8))
    found = part.results
    assert len(found["prompts"]) == len(found["pictures"]) == found["all of it"]["right"].n == 8
    assert found["all of it"]["real"].value > 0.7 and found["all of it"]["right"].value <= 0.5
    assert found["all of it"]["right"].value == pytest.approx(found["all of it"]["real"].value / 2, abs=0.13)
    for about in QUESTIONS:
        assert found[about]["right"].value >= found["all of it"]["right"].value
    relations = set(found) & set(WEIGHTS)
    assert relations == {p.plan.relation for p in prompt_sets.attachments(boxes, "dev", 8)}
    assert sum(found[r]["right"].value * found[r]["right"].n for r in relations) == pytest.approx(
        8 * found["all of it"]["right"].value
    )


def test_icons_without_attachments_leave_the_part_out(evaluate, tmp_path):
    code, _, error = evaluate(tmp_path / "report", "--only", "attachments")
    assert code == 2 and "these icons allow no attachments that were held out" in error
