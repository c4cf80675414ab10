"""The parts of an evaluation. Each draws what it needs (or finds it drawn) and says what it found."""

# N pictures, T captions, D embedding dimension

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upsamplers.model import resize

from ..data.distort import DISTORTIONS
from ..data.judged import damaged, renders
from ..data.render import flatten, render_svg
from ..data.scenes import IconSet, split_of_concept, split_of_icon
from ..pipelines import UnCLIPInpaintPipeline, UnCLIPPriorPipeline
from . import prompts as ask
from .bench import SCENES, Bench, Impossible
from .metrics import (
    Estimate,
    frechet,
    jackknife,
    kernel_distance,
    mean,
    precision_recall,
    psnr,
    ratio,
    sharpness,
    ssim,
)
from .prompts import Prompt
from .report import Part, Plot, Sheet, Table

REPAINTED = 100
TURNS = 3  # 793 names of split test, 769 of dev: more than the 2,000 pictures of other distances
SWEPT = 64
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = (5, 10, 20, 40)
ENLARGED = 32
CHECKED = 500
COPY = 0.06  # RMS difference at 16x16 px, of the range [0, 1], below which a picture repeats a training render
SHOWN = 48


# ---------------------------------------------------------------------------------------------- the judge itself


def judge(bench: Bench) -> Part:
    """How often the judge names real renders, clean and under damage that it was not trained with."""
    rows = renders(bench.icons, bench.count(CHECKED), seed=1)
    wanted = [Prompt("", None, (bench.icons.icons[r]["concept"],)) for r in rows]
    hits = {kind or "clean": bench.named(damaged(bench.icons, rows, kind, seed=1), wanted)[0] for kind in (None, *DISTORTIONS)}
    found = {kind: mean(values) for kind, values in hits.items()}
    found["damaged"] = mean(torch.cat([hits[kind] for kind in DISTORTIONS]))
    note = f"R@1 among {len(bench.icons.recognisable)} names. The damage is none that it was trained with."
    return Part("judge", found, [Table("The judge on real renders", ["renders", "R@1"], list(found.items()), note, True)])


# ---------------------------------------------------------------------------------------------- what is drawn


def recognition(bench: Bench) -> Part:
    """Single concepts by their names: does the judge find the name among all names?"""
    prompts = bench.cut(ask.recognition(bench.icons, bench.split))
    drawn, real = bench.draw("recognition", prompts), bench.truths(prompts)
    known = torch.tensor([p.known for p in prompts])
    groups = {"all": torch.ones_like(known), "concepts that CLIP was trained on": known, "concepts held out of it": ~known}
    return _retrieval(bench, "recognition", "Single concepts", prompts, drawn, real, groups)


def everyday(bench: Bench) -> Part:
    """Everyday English: is the judge's name for the picture one of the acceptable ones?"""
    prompts = bench.cut(ask.everyday(bench.icons, bench.split))
    if not prompts:
        raise Impossible("these icons answer no everyday prompt")
    drawn, real = bench.draw("everyday", prompts), bench.truths(prompts)
    groups = {"all": torch.ones(len(prompts), dtype=torch.bool)}
    return _retrieval(bench, "everyday", "Everyday English", prompts, drawn, real, groups)


def _retrieval(
    bench: Bench, name: str, title: str, prompts: list[Prompt], drawn: Tensor, real: Tensor, groups: dict[str, Tensor]
) -> Part:
    ours, theirs = bench.named(drawn, prompts), bench.named(real, prompts)
    chance = bench.right(prompts).float().mean(1)
    results, rows = {}, []
    for group, member in groups.items():
        if not member.any():
            continue
        found = {
            "r1": mean(ours[0][member]),
            "r5": mean(ours[1][member]),
            "real_r1": mean(theirs[0][member]),
            "real_r5": mean(theirs[1][member]),
            "share_of_real": ratio(ours[0][member], theirs[0][member]),
            "chance": chance[member].mean().item(),
        }
        results[group] = found
        rows.append([group, *found.values()])
    results["prompts"] = [
        {"prompt": p.text, "seed": bench.gallery.seed + n, "first": bool(a), "first_five": bool(b), "real_first": bool(c)}
        for n, (p, a, b, c) in enumerate(zip(prompts, *ours, theirs[0], strict=True))
    ]
    note = f"R@1 and R@5 among {len(bench.icons.recognisable)} names; one picture a prompt, nothing selected."
    columns = ["prompts", "R@1", "R@5", "real R@1", "real R@5", "R@1 of real's", "chance"]
    shown = SHOWN if name == "recognition" else len(prompts)
    marks = ours[0].bool().tolist()
    sheet = Sheet(f"The first {min(shown, len(prompts))}", drawn[:shown], [p.text for p in prompts[:shown]], marks[:shown])
    return Part(name, results, [Table(title, columns, rows, note, True), sheet])


def composition(bench: Bench) -> Part:
    """Held-out combinations: each object among a hundred, and what is said of it among all that could be said."""
    results, rows, sheets = {}, [], []
    for kind, prompts in ask.composition(bench.icons, bench.split, bench.count(ask.PER_KIND)).items():
        if not prompts:
            continue
        pictures = bench.draw(f"composition-{kind}", prompts)
        drawn, chance = answered(bench, pictures, prompts)
        real, _ = answered(bench, bench.truths(prompts), prompts)
        groups = {kind: torch.ones(len(prompts), dtype=torch.bool)}
        if kind == "pair":
            groups["unrelated"] = torch.tensor([len({bench.icons.groups[c] for c in p.plan.concepts}) == 2 for p in prompts])
        for group, member in groups.items():
            if not member.any():
                continue
            chosen = member.nonzero()[:, 0].tolist()
            results[group] = {
                "prompts": [prompts[n].text for n in chosen],
                "pictures": [f"composition-{kind}/{n:05d}.png" for n in chosen],
            }
            for about in drawn:
                found = {
                    "right": mean(drawn[about][member]),
                    "real": mean(real[about][member]),
                    "share_of_real": ratio(drawn[about][member], real[about][member]),
                    "chance": chance[about],
                }
                results[group][about] = found
                rows.append([group, about, *found.values()])
        marks = drawn[list(drawn)[-1]].bool().tolist()
        sheets.append(Sheet(kind, pictures[:24], [p.text for p in prompts[:24]], marks[:24]))
    note = (
        "Combinations that were held out of training, of parts that were in it. Each object is told from 99 others; two by "
        "a detector that compares each half of the picture, in the judge's embeddings, with the renders of every concept. "
        "Unrelated: the pairs whose two objects are of different groups, as an animal and a tool."
    )
    columns = ["kind", "what is right", "drawn", "real renders", "of real's", "chance"]
    return Part("composition", results, [Table("Composition", columns, rows, note, True), *sheets])


def answered(bench: Bench, pictures: Tensor, prompts: list[Prompt]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """For each thing asked, and for all together: which pictures answer rightly [N], and what chance gives.

    Of one object the judge is asked, by captions; of two the detector. The prompts are all of one or all of two.
    """
    asked = [ask.questions(p, bench.icons) for p in prompts]
    if len(prompts[0].plan.concepts) == 2:
        seen = bench.detector.look(pictures)

        def fit(picture: Tensor, question: ask.Question) -> Tensor:
            return bench.detector.fit(picture, question.options)
    else:
        seen = bench.judge.see(pictures)[0]
        captions = sorted({caption for questions in asked for q in questions for caption in q.captions})
        number, words = {c: n for n, c in enumerate(captions)}, bench.judge.read(captions)

        def fit(picture: Tensor, question: ask.Question) -> Tensor:
            return words[[number[c] for c in question.captions]] @ picture

    hits: dict[str, list[float]] = {}
    chances: dict[str, list[float]] = {}

    def note(about: str, hit: bool, chance: float) -> None:
        hits.setdefault(about, []).append(float(hit))
        chances.setdefault(about, []).append(chance)

    for picture, questions in zip(seen, asked, strict=True):
        right = {}
        for q in questions:
            scores = fit(picture, q)
            right[q.about] = bool((scores[0] > scores[1:]).all())
            note(q.about, right[q.about], 1 / len(q.options))
        objects = [q for q in questions if q.about.endswith("object")]
        if 1 < len(objects) < len(questions):
            note("both objects", all(right[q.about] for q in objects), _product(objects))
        if len(questions) > 1:
            note("all of it", all(right.values()), _product(questions))
    return {k: torch.tensor(v) for k, v in hits.items()}, {k: float(np.mean(v)) for k, v in chances.items()}


def _product(questions: Sequence[ask.Question]) -> float:
    return float(np.prod([1 / len(q.options) for q in questions]))


def rectangle(bench: Bench) -> Part:
    """Real renders whose lower right is drawn anew from the name (DALL·E 1, arXiv 2102.12092): are they still that?

    The rectangle goes from a quarter of each side to the lower right corner: 9/16 of the picture. The floor is the render
    with the rectangle left white.
    """
    prompts = bench.cut(ask.recognition(bench.icons, bench.split), REPAINTED)
    real, size = bench.truths(prompts), bench.pipe.sizes[0]
    hole = torch.zeros(real.shape[-2:], dtype=torch.bool)
    hole[real.shape[-2] // 4 :, real.shape[-1] // 4 :] = True
    mask = Image.fromarray(hole.byte().mul(255).numpy())
    tool = UnCLIPInpaintPipeline.from_pipe(bench.pipe)
    tool.set_progress_bar_config(disable=True)
    settings = {k: v for k, v in bench.settings.items() if k != "sampler"}  # repainting has its own

    def batch(chunk: Sequence[int], generators: list[torch.Generator]) -> Tensor:
        (n,) = chunk  # one at a time
        picture = Image.fromarray(real[n].permute(1, 2, 0).numpy())
        return tool(prompts[n].text, picture, mask, generator=generators, size=size, output_type="pt", **settings).images

    drawn = bench.drawn("rectangle", [p.text for p in prompts], batch, batch=1)
    white = real.masked_fill(hole, 255)
    ours, floor, theirs = (bench.named(pictures, prompts) for pictures in (drawn, white, real))
    results: dict[str, Any] = {
        among: {
            "right": mean(ours[n]),
            "floor": mean(floor[n]),
            "real": mean(theirs[n]),
            "share_of_real": ratio(ours[n], theirs[n]),
        }
        for n, among in enumerate(("first", "first five"))
    }
    results["first"]["chance"] = bench.right(prompts).float().mean().item()
    sides = {"right": "drawn anew", "floor": "left white (floor)", "real": "real renders"}
    rows = [[name, results["first"][side], results["first five"][side]] for side, name in sides.items()]
    if drawn.shape == real.shape:
        results["kept_exactly"] = mean((drawn == real).masked_fill(hole, True).flatten(1).all(1).float())
        rows.append(["kept to the pixel outside it", results["kept_exactly"], ""])
    results |= {"prompts": [p.text for p in prompts], "pictures": [f"rectangle/{n:05d}.png" for n in range(len(prompts))]}
    pairs = torch.stack([F.interpolate(white[:12].float(), drawn.shape[-2:]).byte(), drawn[:12]], 1).flatten(0, 1)
    captions = [text for p in prompts[:12] for text in ("given", p.text)]
    marks = [mark for hit in ours[0][:12].bool().tolist() for mark in (None, hit)]
    note = f"The lower right 9/16 of real renders drawn anew from the name. Among {len(bench.icons.recognisable)} names."
    table = Table("A rectangle drawn anew", ["", "R@1", "R@5"], rows, note, True)
    return Part("rectangle", results, [table, Sheet("The first 12", pairs, captions, marks)])


# ---------------------------------------------------------------------------------------------- sets of pictures


def fidelity(bench: Bench) -> Part:
    """Distances between drawn scenes and real ones, beside those between real ones and others; and copies."""
    count = bench.count(SCENES)
    prompts = ask.scenes(bench.icons, bench.split, count)
    others = bench.truths(ask.scenes(bench.icons, bench.split, count, first=count))
    drawn, real = bench.draw("scenes", prompts), bench.truths(prompts)
    features = {name: bench.judge.see(p)[1] for name, p in (("drawn", drawn), ("real", real), ("others", others))}
    results: dict[str, Any] = {"pictures_on_each_side": count}
    rows = []
    for name, statistic in (("Fréchet distance", frechet), ("kernel distance", kernel_distance)):
        found = [jackknife(statistic, features[side], features["others"]) for side in ("drawn", "real")]
        key = name.replace("é", "e").replace(" ", "_").lower()
        results[key], results[f"{key}_floor"] = found
        rows.append([name, *found])
    shares = []
    for side in ("drawn", "real"):
        precision, recall = precision_recall(features[side], features["others"])
        shares.append((mean(precision.float()), mean(recall.float())))
    for place, name in enumerate(("precision", "recall")):
        results[name], results[f"{name}_floor"] = shares[0][place], shares[1][place]
        rows.append([name, shares[0][place], shares[1][place]])
    training = training_renders(bench.icons)
    copies, nearest = {}, {}
    for side, pictures in (("drawn", drawn), ("real", real)):
        nearest[side], match = nearest_render(pictures, training)
        copies[side] = mean((nearest[side] < COPY).float())
        if side == "drawn":
            closest = nearest[side].argsort()[:8]
            pairs = torch.stack([drawn[closest], _on_white(bench.icons, match[closest])], 1).flatten(0, 1)
    results["copies"], results["copies_floor"] = copies["drawn"], copies["real"]
    rows.append([f"within {COPY} RMS of a training render", copies["drawn"], copies["real"]])
    note = (
        f"{count} pictures on each side, of scenes with held-out concepts or combinations; the floor is the same between "
        "two disjoint halves of real renders. In the judge's features."
    )
    labels = [t for n in closest.tolist() for t in (prompts[n].text, f"nearest, at {nearest['drawn'][n]:.3f}")]
    table = Table("Drawn scenes against real ones", ["", "drawn", "real renders (floor)"], rows, note)
    sheets = [
        Sheet("The first 24 scenes", drawn[:24], [p.text for p in prompts[:24]]),
        Sheet("Nearest to training", pairs, labels),
    ]
    return Part("fidelity", results, [table, *sheets])


def training_renders(icons: IconSet) -> tuple[Tensor, Tensor]:
    """All training icons on white at three sizes as 16x16 px [M, 768], and their rows [M]."""
    rows = [n for n, i in enumerate(icons.icons) if split_of_icon(i["concept"], i["style"], all_concepts=True) == "train"]
    kept = []
    for start in range(0, len(rows), 512):
        white = _on_white(icons, torch.tensor(rows[start : start + 512])).float() / 255
        for side in (55, 58, 61):
            small = F.interpolate(white, (side, side), mode="area")
            left = (64 - side) // 2
            padded = F.pad(small, (left, 64 - side - left, left, 64 - side - left), value=1.0)
            kept.append((F.avg_pool2d(padded, 4).flatten(1), torch.tensor(rows[start : start + 512])))
    return torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept])


def nearest_render(pictures: Tensor, training: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Root mean square difference [N] of pictures uint8 [N, 3, 64, 64] to their nearest training render, and its row [N]."""
    small = F.avg_pool2d(pictures.float() / 255, pictures.shape[-1] // 16).flatten(1)
    found = [torch.cdist(chunk, training[0]).min(1) for chunk in small.split(256)]
    distance = torch.cat([f.values for f in found]) / small.shape[1] ** 0.5
    return distance, training[1][torch.cat([f.indices for f in found])]


def _on_white(icons: IconSet, rows: Tensor) -> Tensor:
    sprites = torch.from_numpy(np.asarray(icons.sprites[rows.numpy()])).permute(0, 3, 1, 2).float()
    alpha = sprites[:, 3:] / 255
    return (sprites[:, :3] * alpha + 255 * (1 - alpha)).round().byte()


# ---------------------------------------------------------------------------------------------- the prior

WAYS = ("prior", "text embedding", "no prior", "true embedding")


def led_by_prior(name: str) -> bool:
    """Whether pictures called `name` were drawn after the prior."""
    return not any(_after(way) in name for way in WAYS[1:])


def _after(way: str) -> str:
    return f"-{way.replace(' ', '-')}"


def prior(bench: Bench) -> Part:
    """The paper's section 5.1: the decoder after the prior, after the text embedding in its place, and after neither.

    And after the real picture's embedding, which says more of it than its caption, and any prior, could. Distances are to
    real renders of the same captions, as in the paper's table 2: beside those to other ones, half as uncertain or less. Names
    are too few for them, and so come `TURNS` times, by other seeds and beside other renders. With `two_ways` the scenes are
    drawn by the first two alone.
    """
    turns = [bench.cut(ask.recognition(bench.icons, bench.split, turn)) for turn in range(TURNS)]
    scenes = ask.scenes(bench.icons, bench.split, bench.count(bench.scenes))
    asked = {"names": [p for prompts in turns for p in prompts], "scenes": scenes}
    units = {"names": torch.arange(len(turns[0])).repeat(TURNS), "scenes": torch.arange(len(scenes))}
    real = {kind: bench.judge.see(bench.truths(prompts))[1] for kind, prompts in asked.items()}
    bench.pipe._prepare()  # the dtype that the embeddings below shall have
    null = bench.pipe.text_proj.learned_classifier_free_guidance_embeddings.detach()

    def draw(way: str, folder: str, prompts: list[Prompt], turn: int = 0) -> Tensor:
        embeds = None
        if way == "text embedding":
            embeds = bench.clip.encode_text([p.text for p in prompts])
        elif way == "no prior":
            embeds = null.expand(len(prompts), -1)
        elif way == "true embedding":
            embeds = bench.true_embeddings(prompts)
        return bench.draw(folder if way == "prior" else folder + _after(way), prompts, embeds, turn)

    results, rows, shown, firsts, features = {}, [], [], {}, {}
    for way in WAYS:
        drawn = {"names": torch.cat([draw(way, "recognition", prompts, turn) for turn, prompts in enumerate(turns)])}
        if not bench.two_ways or way in WAYS[:2]:
            drawn["scenes"] = draw(way, "scenes", scenes)
        first, five = (hits.view(TURNS, -1) for hits in bench.named(drawn["names"], asked["names"]))
        firsts[way], features[way] = first.mean(0), {kind: bench.judge.see(seen)[1] for kind, seen in drawn.items()}
        distances = {kind: jackknife(frechet, seen, real[kind], units[kind]) for kind, seen in features[way].items()}
        results[way] = {"r1": mean(firsts[way]), "r5": mean(five.mean(0)), "frechet_distance": distances}
        rows.append([way, results[way]["r1"], results[way]["r5"], *map(distances.get, asked)])
        texts = [p.text for p in turns[0][:12]]
        shown.append(Sheet(f"Drawn after: {way}", drawn["names"][: len(texts)], texts, first[0, :12].bool().tolist()))

    def nearer(x: Tensor, y: Tensor) -> float:
        """How much nearer to `y` the second half of the columns of `x` is than the first."""
        other, ours = x.chunk(2, 1)
        return frechet(other, y) - frechet(ours, y)

    ahead = {}
    for way in ("text embedding", "no prior"):
        both = {kind: torch.cat([seen, features["prior"][kind]], 1) for kind, seen in features[way].items()}
        less = {kind: jackknife(nearer, pairs, real[kind], units[kind]) for kind, pairs in both.items()}
        ahead[way] = {"r1": mean(firsts["prior"] - firsts[way]), "frechet_distance": less}
    cosines = _cosines(bench, scenes)
    results |= {"ahead": ahead, "cosine": cosines}
    counts = f"{len(turns[0])} names, each drawn {TURNS} times, and {len(scenes)} scenes"
    note = f"{counts}, the same prompts and seeds for each; Fréchet distances to real renders of the same captions."
    columns = ["", "R@1", "R@5", "Fréchet distance, names", "Fréchet distance, scenes"]
    first = Table("What stands for the image embedding", columns, rows, note)
    gains = [[f"than {way}", found["r1"], *map(found["frechet_distance"].get, asked)] for way, found in ahead.items()]
    note = "The prior's advantage, prompt by prompt, the seeds the same: more names first, less distance."
    gain = Table("How much better with the prior", [columns[0], columns[1], *columns[3:]], gains, note)
    second = Table("Cosine of image embeddings", ["", "cosine"], list(cosines.items()), "On the same scenes.")
    return Part("prior", results, [first, gain, second, *shown])


def _cosines(bench: Bench, prompts: list[Prompt]) -> dict[str, Estimate]:
    """How near the prior's and the text's embeddings come to those of the real pictures."""
    source = UnCLIPPriorPipeline.from_pipe(bench.pipe)
    source.set_progress_bar_config(disable=True)
    settings = {k: v for k, v in bench.settings.items() if k.startswith("prior")}
    drawn = []
    for start in range(0, len(prompts), 32):
        chunk = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(bench.gallery.seed + start + n) for n in range(len(chunk))]
        drawn.append(source([p.text for p in chunk], generator=generators, **settings).image_embeds.float().cpu())
    prior = F.normalize(torch.cat(drawn), dim=-1)
    text = bench.clip.encode_text([p.text for p in prompts]).cpu()
    true = bench.true_embeddings(prompts).cpu()
    pairs = {
        "prior, true": (prior, true),
        "text, true": (text, true),
        "prior, text": (prior, text),
        "another scene's, true": (true.roll(1, 0), true),
    }
    return {name: mean((a * b).sum(1)) for name, (a, b) in pairs.items()}


def sweeps(bench: Bench) -> Part:
    """Recognition as the decoder's guidance and number of steps change."""
    if bench.settings.get("sampler") == "distilled":
        raise Impossible("a distilled decoder has neither guidance nor steps to sweep over")
    prompts = bench.cut(ask.recognition(bench.icons, bench.split), SWEPT)
    wanted, own = bench.judge.read([p.text for p in prompts]), bench.pipe.sampling_settings(bench.settings)
    results, shown = {}, []
    for name, setting, values in (
        ("guidance", "decoder_guidance_scale", GUIDANCE),
        ("steps", "decoder_num_inference_steps", STEPS),
    ):
        lines: dict[str, list[tuple[float, Estimate]]] = {"R@1": [], "R@5": [], "cosine": []}
        for value in values:
            folder = "recognition" if value == own[setting] else f"sweep-{name}-{value:g}"
            pictures = bench.draw(folder, prompts, **{setting: value})
            found = (*bench.named(pictures, prompts), (bench.judge.see(pictures)[0] * wanted).sum(1))
            for line, numbers in zip(lines.values(), found, strict=True):
                line.append((value, mean(numbers)))
        results[name] = {line: {f"{x:g}": e for x, e in points} for line, points in lines.items()}
        shown.append(Plot(f"The decoder's {name} ({len(prompts)} names)", name, "R@k, cosine to the name", lines))
    return Part("sweeps", results, shown)


# ---------------------------------------------------------------------------------------------- the upsamplers


def upsamplers(bench: Bench) -> Part:
    """Held-out icons enlarged fourfold from true low-resolution renders, beside bicubic; then drawn ones."""
    sizes = bench.pipe.sizes
    if len(sizes) < 2:
        raise Impossible("this model has no upsampler")
    icons, split = bench.icons, ask.SPLITS[bench.split]
    rows = [r for r in renders(icons, seed=2) if split_of_concept(icons.icons[r]["concept"]) == split]
    rows = bench.cut(rows, ENLARGED)
    texts = [icons.icons[r]["concept"] for r in rows]
    truth = {sizes[-1]: torch.stack([_render(icons.icons[r]["svg"], sizes[-1]) for r in rows]).float() / 255}
    for size in reversed(sizes[:-1]):
        truth[size] = F.avg_pool2d(truth[sizes[-1]], sizes[-1] // size)
    drawn = bench.draw("recognition", bench.cut(ask.recognition(icons, bench.split), ENLARGED)).float() / 255
    results, lines, generated, shown = {}, [], [], []
    for low, high in zip(sizes, sizes[1:], strict=False):
        name = f"{low} to {high}"
        ours = _enlarged(bench, f"upsampled-{low}-{high}", texts, truth[low], high)
        plain = resize(truth[low], high).clamp(0, 1)
        ours_psnr, plain_psnr = _each(psnr, ours, truth[high]), _each(psnr, plain, truth[high])
        true_sharpness = _each(sharpness, truth[high])
        found = {
            "psnr": mean(ours_psnr),
            "psnr_bicubic": mean(plain_psnr),
            "gain": mean(ours_psnr - plain_psnr),
            "ssim": mean(_each(ssim, ours, truth[high])),
            "ssim_bicubic": mean(_each(ssim, plain, truth[high])),
            "sharpness": ratio(_each(sharpness, ours), true_sharpness),
            "sharpness_bicubic": ratio(_each(sharpness, plain), true_sharpness),
        }
        results[name] = found
        lines.append([name, *found.values()])
        shown.append(_strip(f"{name}: true, bicubic, enlarged", truth[high], plain, ours, texts))
        from_drawn = _enlarged(bench, f"upsampled-drawn-{low}-{high}", [f"drawn {n}" for n in range(len(drawn))], drawn, high)
        enlarged = resize(drawn, high).clamp(0, 1)
        found = {
            "consistency": mean(_each(psnr, F.avg_pool2d(from_drawn, high // low), drawn)),
            "sharpness": mean(_each(sharpness, from_drawn) / true_sharpness.mean()),
            "sharpness_bicubic": mean(_each(sharpness, enlarged) / true_sharpness.mean()),
        }
        results[f"{name}, drawn"] = found
        generated.append([name, *found.values()])
        drawn = from_drawn
    note = f"{len(rows)} icons of held-out concepts. Sharpness: of the steepest twentieth of the pixels, over the true one."
    columns = ["px", "PSNR", "PSNR bicubic", "gain", "SSIM", "SSIM bicubic", "sharpness", "sharpness bicubic"]
    first = Table("From true low-resolution renders", columns, lines, note)
    columns = ["px", "PSNR made small again", "sharpness", "sharpness bicubic"]
    second = Table(
        "From drawn ones", columns, generated, "Made small again, against what was enlarged. Sharpness beside real renders'."
    )
    return Part("upsamplers", results, [first, second, *shown])


def _each(metric: Callable[..., Tensor], *pictures: Tensor) -> Tensor:
    """A metric [N] of pictures [N, 3, H, W], a few at a time: at 1024 px its intermediate steps are large."""
    return torch.cat([metric(*chunk) for chunk in zip(*(p.split(4) for p in pictures), strict=True)])


def _enlarged(bench: Bench, name: str, texts: list[str], low: Tensor, size: int) -> Tensor:
    """Pictures [N, 3, s, s] in [0, 1] through the model's upsampler, [N, 3, size, size]."""

    def batch(chunk: Sequence[int], generators: list[torch.Generator]) -> Tensor:
        return bench.pipe.upsample(low[list(chunk)], size, generators)

    return bench.drawn(name, texts, batch, batch=4).float() / 255


def _render(svg: str, size: int) -> Tensor:
    return torch.from_numpy(flatten(render_svg(svg, size))).permute(2, 0, 1)


def _strip(title: str, true: Tensor, plain: Tensor, ours: Tensor, texts: list[str], count: int = 4) -> Sheet:
    """Middle parts of the first few pictures, three ways side by side."""
    side, size = 192, true.shape[-1]
    left = (size - side) // 2
    rows = torch.stack([true[:count], plain[:count], ours[:count]], 1).flatten(0, 1)
    crops = (rows[..., left : left + side, left : left + side] * 255).round().byte()
    labels = [f"{t}, {how}" for t in texts[:count] for how in ("true", "bicubic", "enlarged")]
    return Sheet(title, crops, labels, side=192)
