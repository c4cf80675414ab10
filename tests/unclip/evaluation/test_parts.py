"""The parts that look at single names, over the tiny model, and over real renders in its images' place."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from evaluated import Comparing, put, results
from PIL import Image

from unclip.evaluation import prompts as prompt_sets
from unclip.evaluation.context import EvaluationContext
from unclip.evaluation.pair_detector import PairDetector
from unclip.evaluation.parts import PARTS
from unclip.evaluation.parts.copies import MIN_PSNR, nearest_objects, object_crops
from unclip.evaluation.parts.flatness import rendered_in_pose
from unclip.evaluation.poses import POSE, in_pose, jittered
from unclip.evaluation.sample_store import SampleStore
from unclip.evaluation.single_concepts import SingleConcepts
from unclip.evaluation.summary import AT_LEAST, AT_MOST, summary

NEW = ("likeness", "flatness", "style", "parts", "copies")


def test_names_are_such_as_were_trained_on_each_with_an_icon_that_was(icons, tmp_path):
    from unclip.data.plans import split_of_icon

    singles = SingleConcepts(EvaluationContext(None, None, icons, SampleStore(tmp_path), "dev", limit=8))
    every = prompt_sets.recognition(icons, "dev")
    assert [every[n] for n in singles.numbers] == singles.prompts and len(singles.prompts) == 8
    for prompt, styled, row, rows in zip(singles.prompts, singles.styled, singles.rows, singles.of_name, strict=True):
        icon = icons.icons[row]
        assert icon["concept"] == prompt.text and split_of_icon(icon["concept"], icon["style"]) == "train"
        assert styled.text == f"{prompt.text} in {icon['style']} style"
        assert row in rows and {icons.icons[r]["concept"] for r in rows} == {prompt.text} and len(rows) == 4


def test_real_renders_in_the_place_of_images_are_like_themselves(evaluate, icons, tmp_path):
    out = tmp_path / "report"
    words = [word for name in NEW for word in ("--only", name)]
    code, _, error = evaluate(out, *words, "--steps", 1)
    assert code == 0, error
    found = results(out)["results"]
    assert list(found) == [name for name in PARTS if name in NEW]
    assert found["likeness"]["prior"]["value"] < 12 and found["copies"]["names"]["count"] == 0
    assert found["flatness"]["64 px"]["flat share"]["sampled"]["value"] < 0.1

    singles = SingleConcepts(EvaluationContext(None, None, icons, SampleStore(tmp_path / "none"), "dev", limit=8))
    images = out / "pictures"
    put(singles.real, images / "recognition", singles.numbers)
    for folder in ("names-true-embedding", "names-styled"):
        put(singles.real, images / folder)
    put(rendered_in_pose(icons, singles.rows, 256), images / "upsampled-names-64-256")
    scenes = prompt_sets.scenes(icons, "dev", 8)
    put(EvaluationContext(None, None, icons, None, "dev").real_renders(scenes), images / "scenes")
    assert evaluate(out, *words, "--steps", 1)[0] == 0
    real = results(out)["results"]
    likeness = real["likeness"]
    ways = ("true embedding", "prior", "true embedding, its own icon", "prior, style named")
    assert all(likeness[way]["low"] > 99 for way in ways)
    assert 18 < likeness["real"]["another size and place"]["value"] < 99
    assert likeness["real"]["another style (floor)"]["value"] < likeness["real"]["another size and place"]["value"]
    for size in ("64 px", "256 px"):
        for sides in real["flatness"][size].values():
            assert sides["sampled"] == sides["real"]
    assert real["style"]["image: most similar render"]["sampled"]["value"] == 1
    assert real["style"]["prior: style"] == found["style"]["prior: style"], "the prior is the same"
    assert all(real["parts"][side]["same"]["value"] == 1 for side in ("prior", "true embedding"))
    assert real["copies"]["names"]["rate"]["value"] == 1 and real["copies"]["names"]["count"] == 8
    assert real["copies"]["scenes"]["count"] > found["copies"]["scenes"]["count"] == 0
    assert real["copies"]["real: never trained on"]["rate"]["value"] < 0.5
    assert set(real["copies"]["names"]["prompts"]) == {p.text for p in singles.prompts}


def test_objects_are_found_in_each_half(icons):
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    image[:, 20:44, 4:24], image[:, 24:40, 40:60] = 0, 90
    found = [tuple(box) for box, _ in object_crops(image)]
    assert found[:3] == [(20, 4, 44, 60), (20, 4, 44, 24), (24, 40, 40, 60)]
    assert all(window.shape == (3, 64, 64) for _, window in object_crops(image))
    assert object_crops(torch.full((3, 64, 64), 77, dtype=torch.uint8)) == []


def test_an_icon_is_found_wherever_it_stands_and_what_is_none_is_not(icons, tmp_path):
    from unclip.data.render import BACKGROUNDS, Layer, compose_sprites

    context = EvaluationContext(None, Comparing(), icons, SampleStore(tmp_path), "dev")
    trained = [row for row in SingleConcepts(context).rows if icons.icons[row]["concept"] not in ("dot", "circle")]
    first, second = trained[:2]
    two = [Layer(first, 0.25, 0.5, 0.46), Layer(second, 0.76, 0.5, 0.44)]
    alone, ground = [Layer(second, 0.53, 0.48, 0.8)], BACKGROUNDS["blue"]
    images = [compose_sprites(two, icons.sprites, 64), compose_sprites(alone, icons.sprites, 64, ground)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    grain = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    copies = nearest_objects(context, torch.cat([images, grain, torch.full_like(grain, 255)]))
    assert [copy.psnr >= MIN_PSNR for copy in copies] == [True, True, False, False]
    assert copies[0].row in (first, second) and copies[1].row == second
    assert copies[3].psnr == 0
    assert isinstance(context.pair_detector, PairDetector)


def test_larger_renders_are_the_icons_in_their_pose(icons):
    assert torch.equal(rendered_in_pose(icons, [5], 256)[:, :, :2, :2], torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    small = torch.nn.functional.avg_pool2d(rendered_in_pose(icons, [5, 40], 256).float(), 4)
    assert (small - in_pose(icons, [5, 40]).float()).abs().mean() < 2
    assert POSE[2] == pytest.approx(0.91) and not torch.equal(jittered(icons, [5], 0), in_pose(icons, [5]))


def test_the_command_lists_every_part(command):
    said = " ".join(command("evaluate", "--help")[1].replace("│", " ").split())
    assert all(f"{name}," in said or f"{name}." in said for name in PARTS)


def test_every_target_is_met_where_it_is_and_missed_where_not():
    from unclip.evaluation.metrics import Estimate

    def nested(keys: tuple[str, ...], value: float) -> dict:
        inner = Estimate(value, value, value, 8)
        for key in reversed(keys):
            inner = {key: inner}
        return inner

    for what, keys, least in AT_LEAST:
        for value, met in ((1e3, "yes" if least else ""), (-1.0, "no" if least else "")):
            assert [what, met] in [[row[0], row[3]] for row in summary(nested(keys, value), "", "", 1.0).rows]
    for what, keys, most in AT_MOST:
        for value, met in ((most, "yes"), (most + 1e-3, "no")):
            assert [what, met] in [[row[0], row[3]] for row in summary(nested(keys, value), "", "", 1.0).rows]
    assert [row[0] for row in summary({}, "", "", 1.0).rows] == ["weights, MB"]


def test_two_reports_make_a_page_of_pairs(evaluate, tmp_path):
    for name, seed in (("old", 0), ("new", 1)):
        assert evaluate(tmp_path / name, "--only", "pairs", "--steps", 1, "--seed", seed)[0] == 0
    found = results(tmp_path / "new")["results"]["pairs"]
    assert found["prompts"] == ["star"] and found["pictures"] == ["upsampled-common-64-256/00000.png"]
    words = [sys.executable, ROOT / "benchmarks" / "pairs.py", tmp_path / "old", tmp_path / "new"]
    said = subprocess.run([*words, "--out", tmp_path / "pairs.html"], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(tmp_path / "pairs.html"), str(tmp_path / "pairs.png")]
    page = (tmp_path / "pairs.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page and "star" in page
    sheet = Image.open(tmp_path / "pairs.png")
    for place, name in enumerate(("old", "new")):
        image = Image.open(tmp_path / name / "pictures" / found["pictures"][0]).resize((128, 128), Image.Resampling.LANCZOS)
        assert sheet.crop((128 * place, 18, 128 * place + 128, 146)).tobytes() == image.tobytes()
    shutil.rmtree(tmp_path / "old")
    assert evaluate(tmp_path / "old", "--only", "recognition", "--steps", 1)[0] == 0
    failed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "has no common concepts" in failed.stderr
