"""The evaluation itself: an oracle finds the truth true, and a report is whole, repeatable and resumable."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from pretend_device import DEVICE, PretendDevice
from running import finish, launch
from safetensors.torch import load_file, save_file

from unclip.clip.judge import Judge
from unclip.data.scenes import IconSet
from unclip.evaluation import prompts as prompt_sets
from unclip.evaluation.context import EvaluationContext
from unclip.evaluation.parts import PARTS
from unclip.evaluation.parts.composition import answers_of
from unclip.evaluation.parts.fidelity import COPY, nearest_render, training_renders
from unclip.evaluation.parts.prior import TURNS, WAYS
from unclip.evaluation.run import Settings, _open
from unclip.evaluation.run import evaluate as run_evaluation
from unclip.evaluation.sample_store import SampleStore
from unclip.pipelines import UnCLIPPipeline


class Oracle:
    """Knows each image's caption by its bytes, and gives every text a direction of its own."""

    def __init__(self, images: torch.Tensor, captions: list[str]):
        self.captions = {p.numpy().tobytes(): c for p, c in zip(images, captions, strict=True)}

    def read(self, captions: list[str]) -> torch.Tensor:
        seeds = (int(hashlib.sha256(c.encode()).hexdigest()[:12], 16) for c in captions)
        return F.normalize(torch.stack([torch.randn(256, generator=torch.Generator().manual_seed(s)) for s in seeds]), dim=-1)

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.read([self.captions[p.numpy().tobytes()] for p in images])
        return found, found


class Comparing:
    """Sees shapes and colours as they are, apart from the ground."""

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = F.interpolate(images.float() / 255, (16, 16), mode="area")
        found = F.normalize((small - small[:, :, :1, :1]).flatten(1), dim=-1)
        return found, found


def context(icons: IconSet, tmp_path: Path, prompts: list[prompt_sets.Prompt]) -> tuple[EvaluationContext, torch.Tensor]:
    made = EvaluationContext(None, None, icons, SampleStore(tmp_path), "dev")
    images = made.real_renders(prompts)
    made.judge = Oracle(images, [p.text for p in prompts])
    return made, images


def test_real_renders_under_an_oracle_are_all_right_and_shuffled_ones_are_at_chance(icons, tmp_path):
    prompts = prompt_sets.recognition(icons, "dev") + prompt_sets.recognition(icons, "test")
    made, images = context(icons, tmp_path, prompts)
    first, five = made.name_recall(images, prompts)
    assert first.all() and five.all()
    hits = [made.name_recall(images.roll(n, 0), prompts) for n in range(1, len(prompts))]
    first, five = (torch.stack(h).mean().item() for h in zip(*hits, strict=True))
    assert first == 0 and five == pytest.approx(4 / 25, abs=0.05)  # a wrong image's own name is always first


def test_compositions_under_an_oracle_are_all_right_and_shuffled_ones_are_at_chance(icons, tmp_path):
    for prompts in filter(None, prompt_sets.composition(icons, "test", 16).values()):
        made, images = context(icons, tmp_path, prompts)
        two = len(prompts[0].plan.concepts) == 2
        if two:
            made.judge = Comparing()
        hits, chance = answers_of(made, images, prompts)
        assert hits and all(len(h) == len(prompts) and h.mean() > (0.8 if two else 0.999) for h in hits.values())
        if len(prompts) < 8:
            continue
        shuffled = [answers_of(made, images.roll(n, 0), prompts)[0] for n in (1, 2, 3)]
        concepts = [set(p.plan.concepts) for p in prompts]
        other = [not two or not concepts[i] & concepts[i - n] for n in (1, 2, 3) for i in range(len(prompts))]
        for about, expected in chance.items():
            found = torch.cat([hits[about] for hits in shuffled])[torch.tensor(other)]
            error = max((expected * (1 - expected) / len(found)) ** 0.5, 1 / len(found))
            assert abs(found.mean().item() - expected) < 4.5 * error, (about, found.mean(), expected)


def test_what_is_not_there_is_not_detected(icons, tmp_path):
    prompts = prompt_sets.composition(icons, "test", 16)["relation"]
    made, images = context(icons, tmp_path, prompts)
    made.judge = Comparing()
    blank, _ = answers_of(made, torch.full_like(images, 255), prompts)
    assert not any(hits.any() for hits in blank.values())
    axes = [2 if p.plan.relation in ("left", "right") else 1 for p in prompts]
    swapped = torch.stack([image.roll(32, axis) for image, axis in zip(images, axes, strict=True)])
    found, _ = answers_of(made, swapped, prompts)
    assert found["both objects"].mean() > 0.9 and not found["place"].any()


def test_a_training_render_is_a_copy_and_a_held_out_one_is_none(icons):
    training = training_renders(icons)
    assert len(training[0]) == 3 * len(set(training[1].tolist()))
    row = int(training[1][0])
    sprite = torch.tensor(icons.sprites[row]).permute(2, 0, 1).float()
    white = (sprite[:3] * sprite[3:] / 255 + 255 - sprite[3:]).round().byte()[None]
    padded = F.pad(F.interpolate(white.float(), (58, 58), mode="area"), (3, 3, 3, 3), value=255.0).byte()
    distance, match = nearest_render(padded, training)
    assert distance.item() < COPY and icons.icons[int(match)]["concept"] == icons.icons[row]["concept"]
    noise = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert nearest_render(noise, training)[0].item() > 3 * COPY


def test_a_gallery_draws_what_is_missing_and_nothing_else(tmp_path):
    asked = []

    def draw(chunk, generators):
        asked.append(list(chunk))
        return torch.stack([torch.rand(3, 8, 8, generator=g) for g in generators])

    sample_store = SampleStore(tmp_path, seed=3, batch=4)
    whole = sample_store.images("a", 10, draw)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and whole.shape == (10, 3, 8, 8)
    asked.clear()
    (tmp_path / "a" / "00005.png").unlink()
    assert torch.equal(sample_store.images("a", 10, draw), whole) and asked == [[4, 5, 6, 7]]
    assert torch.equal(SampleStore(tmp_path, seed=3).images("a", 6, draw), whole[:6])
    assert torch.equal(sample_store.images("b", 4, draw, first=6), whole[6:])
    (tmp_path / "a" / "00002.png").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"00002.png is damaged .*delete it"):
        sample_store.images("a", 10, draw)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    """The tiny model, to be changed, without the last upsampler, which takes most of the time."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"upsampler_1024": [None, None], "upsampler_1024_scheduler": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def numbers(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_a_report_is_whole_and_an_interrupted_one_is_the_unbroken_one(evaluate, tmp_path):
    out, parts = tmp_path / "report", ("--only", "recognition", "--only", "fidelity")
    code, said, error = evaluate(out, *parts)
    assert code == 0, error
    assert said.split() == [str(out / "report.json"), str(out / "report.html")]
    found = numbers(out)
    assert list(found["results"]) == ["recognition", "fidelity"]
    assert "unclip evaluate" in found["command"] and "--only recognition" in found["command"]
    protocol = found["protocol"]
    assert protocol["sampling"]["decoder_num_inference_steps"] == 3 and protocol["seed"] == 0 and protocol["split"] == "dev"
    all_of_it = found["results"]["recognition"]["all"]
    assert all_of_it["chance"] == pytest.approx(1 / 26) and all_of_it["r1"]["n"] == 8
    assert all_of_it["r1"]["low"] <= all_of_it["r1"]["value"] <= all_of_it["r1"]["high"]
    assert [p["seed"] for p in found["results"]["recognition"]["prompts"]] == list(range(8))
    assert (
        found["results"]["fidelity"]["frechet_distance"]["value"]
        > found["results"]["fidelity"]["frechet_distance_floor"]["value"]
    )
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 16 and "Protocol" in page
    assert not any(word in page for word in ("http:", "https:", "<script", "<link")), "it needs nothing beside it"
    drawn = {p: p.read_bytes() for p in sorted(out.rglob("*.png"))}
    assert len(drawn) == 16

    shutil.copytree(out, tmp_path / "broken")
    for lost in ("report.json", "report.html", "pictures/scenes/00003.png", "pictures/recognition/00000.png"):
        (tmp_path / "broken" / lost).unlink()
    assert evaluate(tmp_path / "broken", *parts)[0] == 0
    assert numbers(tmp_path / "broken")["results"] == found["results"]
    assert [p.read_bytes() for p in sorted((tmp_path / "broken").rglob("*.png"))] == list(drawn.values())

    code, _, error = evaluate(out, *parts, "--seed", 1)
    assert code == 2 and "another seed (0, now 1)" in error and "--force" in error and len(error.splitlines()) == 1
    assert {p: p.read_bytes() for p in sorted(out.rglob("*.png"))} == drawn
    assert evaluate(out, "--only", "recognition", "--seed", 1, "--force")[0] == 0
    assert numbers(out)["protocol"]["seed"] == 1 and len(list(out.rglob("*.png"))) == 8


def test_two_processes_share_the_drawing_and_find_the_same(evaluate, tiny_folder, tiny_judge, tmp_path):
    """Eight images are one batch of the main process; rectangles are drawn one by one, four by each."""
    alone, out, parts = tmp_path / "alone", tmp_path / "two", ("--only", "recognition", "--only", "rectangle", "--steps", 1)
    assert evaluate(alone, *parts)[0] == 0
    words = ["evaluate", tiny_folder, "--out", out, "--data", "shapes", "--judge", tiny_judge, "--limit", 8, *parts]
    first, second = launch(["-m", "unclip", *map(str, words)], 2)
    said = finish([first, second])
    assert first.answered().split() == [str(out / name) for name in ("report.json", "report.html")] and not second.answered()
    assert "recognition: 100%" in said and "8/8" in said, said
    assert "rectangle: 100%" in said and "4/4" in said, said
    assert said.count("part 1 of 2: recognition") == 1 and "part 1 of 2" not in second.said()
    ours, whole = numbers(out), numbers(alone)
    assert ours["protocol"] == whole["protocol"] and ours["results"] == whole["results"]
    drawn = {p.relative_to(alone): np.array(Image.open(p), dtype=int) for p in alone.rglob("*.png")}
    assert len(drawn) == 16 and len(list(out.rglob("*.png"))) == 16
    assert all(abs(np.array(Image.open(out / name)) - image).max() <= 1 for name, image in drawn.items())


def test_other_upsamplers_draw_anew_what_they_enlarge_alone(evaluate, model, tmp_path):
    out, other, parts = tmp_path / "report", tmp_path / "other", ("--only", "recognition", "--only", "upsamplers")
    assert evaluate(out, *parts, model=model)[0] == 0
    drawn = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*.png")}
    enlarged = {p for p in drawn if p.parent.name.startswith("upsampled-")}
    assert enlarged and set(drawn) > enlarged
    shutil.copytree(model, other)
    weights = other / "super_res_first" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.1 for k, v in load_file(weights).items()}, weights)
    code, _, error = evaluate(out, *parts, model=other)
    assert code == 0 and "other upsamplers than before" in error
    again = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*.png")}
    assert all((again[p] == drawn[p]) == (p not in enlarged) for p in drawn)
    schedule = other / "decoder_scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace('"solver_order": 2', '"solver_order": 1'))
    code, _, error = evaluate(out, *parts, model=other)
    assert code == 2 and "another weights" in error and set(out.rglob("*.png")) == set(drawn)
    shutil.copytree(model / "decoder_scheduler", other / "decoder_scheduler", dirs_exist_ok=True)
    weights = other / "decoder" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.1 for k, v in load_file(weights).items()}, weights)
    code, _, error = evaluate(out, *parts, model=other)
    assert code == 2 and "another weights" in error and set(out.rglob("*.png")) == set(drawn)


def test_another_prior_draws_anew_what_it_leads_to_alone(evaluate, model, tmp_path):
    out, parts = tmp_path / "report", ("--only", "recognition", "--only", "prior", "--only", "upsamplers", "--steps", 1)
    assert evaluate(out, *parts, model=model)[0] == 0
    drawn, found = {p: p.read_bytes() for p in out.rglob("*.png")}, numbers(out)["results"]["prior"]
    weights = model / "prior" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.1 for k, v in load_file(weights).items()}, weights)
    code, _, error = evaluate(out, *parts, model=model)
    assert code == 0 and "another prior than before" in error
    assert evaluate(tmp_path / "fresh", *parts, model=model)[0] == 0
    again = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert again == {out / p.relative_to(tmp_path / "fresh"): p.read_bytes() for p in (tmp_path / "fresh").rglob("*.png")}
    assert numbers(out)["results"] == numbers(tmp_path / "fresh")["results"]
    changed = {p.parent.name for p in drawn if again[p] != drawn[p]}
    assert {"recognition", "recognition-turn-2", "scenes", "upsampled-drawn-64-256"} <= changed, changed
    now = numbers(out)["results"]["prior"]
    assert now["prior"] != found["prior"] and all(now[way] == found[way] for way in WAYS[1:])


def test_a_rectangle_is_drawn_anew_and_abilities_are_a_table_of_the_report(evaluate, tmp_path):
    out, sheet = tmp_path / "report", tmp_path / "abilities.png"
    code, _, error = evaluate(out, "--only", "composition", "--only", "rectangle", "--steps", 1)
    assert code == 0, error
    found = numbers(out)["results"]
    assert found["rectangle"]["kept_exactly"]["value"] == 1
    assert found["rectangle"]["first"]["floor"]["n"] == 8 and len(found["rectangle"]["prompts"]) == 8
    assert "unrelated" not in found["composition"]  # shapes are all of one group
    words = [sys.executable, ROOT / "benchmarks" / "abilities.py", out, "--out", sheet]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    lines = {line.split(" | ")[0].strip("| "): line for line in said.splitlines() if line.startswith("| ")}
    colour = found["composition"]["colour"]["all of it"]["right"]
    assert f"{100 * colour['value']:.1f}% (" in lines["control of attributes: colour"]
    assert "not measured" in lines["combining unrelated concepts"] and "not measured" not in lines["regenerating a rectangle"]
    assert Image.open(sheet).height > 3 * 96


def test_bad_input_is_one_line(evaluate, command, tiny_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    cases = [
        (evaluate(tmp_path / "a", "--only", "recogniton"), "unknown part 'recogniton' (did you mean 'recognition'?)"),
        (evaluate(tmp_path / "a", "--split", "train"), "split must be dev or test, got 'train'"),
        (evaluate(tmp_path / "a", "--limit", 3), "limit must be at least 8, got 3"),
        (evaluate(tmp_path / "a", "--scenes", 3), "scenes must be at least 100, got 3"),
        (evaluate(tmp_path / "a", model="nonsense"), "unknown model 'nonsense'"),
        (evaluate(tmp_path / "a", "--judge", tmp_path / "none"), "no judge at"),
        (evaluate(tmp_path / "a", "--data", tmp_path), "unclip data emoji"),
        (evaluate(tmp_path / "taken"), "is no evaluation"),
        (evaluate(tmp_path / "a", "--only", "everyday"), "answer no everyday prompt"),
    ]
    for (code, said, error), message in cases:
        assert code == 2 and said == "" and message in error, error
        assert "Traceback" not in error
    assert not (tmp_path / "taken" / "report.json").exists()


@pytest.mark.slow
def test_every_part_finds_something_to_say(evaluate, tmp_path):
    code, _, error = evaluate(tmp_path / "report")
    assert code == 0, error
    found = numbers(tmp_path / "report")
    left_out = ["everyday", "attachments"]  # the shapes allow none
    assert list(found["results"]) == [name for name in PARTS if name not in left_out]
    assert list(found["protocol"]["left_out"]) == left_out
    assert {row["what"] for row in found["summary"]} >= {"weights, MB", "Fréchet distance, times the floor"}
    assert found["results"]["upsamplers"]["64 to 256"]["psnr_bicubic"]["value"] > 15
    own, images = found["protocol"]["sampling"]["decoder_guidance_scale"], tmp_path / "report" / "pictures"
    assert f"{own:g}" in found["results"]["sweeps"]["guidance"]["R@1"]
    assert (images / "sweep-guidance-5").exists() and not (images / f"sweep-guidance-{own:g}").exists(), "drawn already"
    ways = found["results"]["prior"]
    again = [p.read_bytes() for p in images.glob("recognition-text-embedding*/00000.png")]
    assert len(again) == len(set(again)) == TURNS, "each turn has seeds of its own"
    for kind in ("names", "scenes"):
        distances = {way: ways[way]["frechet_distance"][kind]["value"] for way in WAYS}
        assert len(set(distances.values())) == 4
        for way, ahead in ways["ahead"].items():
            apart = distances[way] - distances["prior"]
            assert ahead["frechet_distance"][kind]["value"] == pytest.approx(apart, abs=1e-5)
    for way, ahead in ways["ahead"].items():
        assert ahead["r1"]["value"] == pytest.approx(ways["prior"]["r1"]["value"] - ways[way]["r1"]["value"], abs=1e-5)
    assert (tmp_path / "report" / "report.html").read_text().count("<svg") == 2


def test_the_prior_is_at_no_distance_where_it_leads_to_the_real_images_of_its_captions(evaluate, icons, tmp_path):
    out = tmp_path / "report"
    assert evaluate(out, "--only", "fidelity", "--only", "recognition")[0] == 0
    asked = {"scenes": prompt_sets.scenes(icons, "dev", 8), "recognition": prompt_sets.recognition(icons, "dev")[:8]}
    asked |= {f"recognition-turn-{turn}": prompt_sets.recognition(icons, "dev", turn)[:8] for turn in range(1, TURNS)}
    for folder, prompts in asked.items():
        real = context(icons, tmp_path, prompts)[0].real_renders(prompts)
        (out / "pictures" / folder).mkdir(exist_ok=True)
        for n, image in enumerate(real):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / "pictures" / folder / f"{n:05d}.png")
    assert evaluate(out, "--only", "prior")[0] == 0
    found = numbers(out)
    ways = found["results"]["prior"]
    for kind in ("names", "scenes"):
        distances = {way: ways[way]["frechet_distance"][kind]["value"] for way in WAYS[:3]}
        assert distances["prior"] < 1e-6 < 1e-3 < min(distances["text embedding"], distances["no prior"]), distances
        assert all(ahead["frechet_distance"][kind]["low"] > 0 for ahead in ways["ahead"].values())
    assert ways["prior"]["frechet_distance"]["names"]["n"] == TURNS * ways["prior"]["r1"]["n"] == TURNS * 8
    ahead = {row["what"]: row["found"] for row in found["summary"] if row["what"].startswith("prior ahead")}
    assert all("Fréchet distance" in measures for measures in ahead.values()) and len(ahead) == 2, ahead


def test_force_deletes_no_images_but_an_evaluations(tmp_path):
    settings = Settings("emoji", out=tmp_path / "out", force=True)
    photo = settings.out / "pictures" / "holiday" / "a.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"mine")
    _open(settings, {"seed": 0})
    assert photo.read_bytes() == b"mine"
    photo.parent.with_name("recognition").mkdir()
    _open(settings, {"seed": 1})
    assert not photo.parent.with_name("recognition").exists(), "what an evaluation left"
    (settings.out / "drawn_with.json").write_text("{half")
    _open(settings, {"seed": 1})
    assert json.loads((settings.out / "drawn_with.json").read_text()) == {"seed": 1}, "what was there is not asked"


def test_images_are_drawn_and_judged_where_the_model_is(tiny_folder, tiny_judge, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # a module's parameters change kind
    pipe, judge = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float32), Judge.load(tiny_judge)
    monkeypatch.setattr(Judge, "load", lambda _: judge)
    found = []
    for device in ("cpu", DEVICE):
        settings = Settings(str(tiny_folder), "dev", tmp_path / str(device), ["prior"], 8, "shapes", str(tiny_judge))
        settings.sampling = {"prior_num_inference_steps": 1, "decoder_num_inference_steps": 1}
        with PretendDevice(), torch.no_grad():
            found.append(run_evaluation(settings, lambda _, device=device: pipe.to(device), "here")[0])
    one, other = (json.loads(path.read_text())["results"]["prior"] for path in found)
    for way in WAYS:
        assert one[way]["r1"] == other[way]["r1"]
        for distance, same in zip(*(r[way]["frechet_distance"].values() for r in (one, other)), strict=True):
            assert distance["value"] == pytest.approx(same["value"], rel=0.02)  # of images rounded to 8 bits
