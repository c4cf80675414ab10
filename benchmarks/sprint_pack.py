"""The inputs of `sprint.py`: drawings, embeddings, a frozen CLIP, start weights and a bank of plans, in parts of a size."""

import argparse
import gzip
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from prior.storage import store_in_8_bits
from unclip.clip.model import PARTS as CLIP_PARTS
from unclip.data.bank import PlanBank, sprites_fingerprint, tokenizer_fingerprint
from unclip.data.bank_build import build_bank
from unclip.data.icons import IconSet
from unclip.io.checkpoints import OWN, components_folder, load_components, read_object, resolve, save_components
from unclip.runtime.config import load_config
from unclip.training.objectives import create
from unclip.training.objectives.frozen_clip import FrozenCLIP
from unclip.training.objectives.icon_bank import IconBank

PARTS, PART_BYTES = 3, 56 * 2**20
TRAINED = {"decoder": ("decoder", "text_proj"), "prior": ("prior",), "draft": ("text_proj",)}  # of a stage
SETTINGS, BANK, EMBEDS = "settings.json", "bank.npz", "data/embeddings.safetensors"
SPRITES, PACKED = "data/sprites-64.npy", ".xz"
TINY_PLANS, PLANS = 2_000, 1_000_000


def pack(options: argparse.Namespace) -> None:
    """Make part `options.part` of the inputs in `options.pack`, which keeps all of them for the next part."""
    whole = options.pack / "whole"
    if not (whole / SETTINGS).is_file():
        _gather(options, whole)
    part, folder = _shared_out(whole)[options.part - 1], options.pack / f"part-{options.part}"
    shutil.rmtree(folder, ignore_errors=True)
    for name in part:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / name, folder / name)
    size = sum((folder / name).stat().st_size for name in part)
    print(f"{folder}: {len(part)} files, {size / 2**20:.1f} MiB")


def unpack(inputs: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that the parts of the inputs are put together in, and their settings.

    Raises FileNotFoundError where a part is lacking.
    """
    whole = inputs / "unpacked"
    for file in sorted(inputs.glob("part-*/**/*")):
        target = whole / Path(*file.relative_to(inputs).parts[1:])
        if not file.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == PACKED:
            with lzma.open(file) as packed, open(target.with_suffix(""), "wb") as plain:
                shutil.copyfileobj(packed, plain, 2**24)
        else:
            shutil.copy(file, target)
    if not (whole / SETTINGS).is_file():
        raise FileNotFoundError(f"{inputs} lacks the first part of the inputs; make it by --pack {inputs} --part 1")
    settings = read_object(whole / SETTINGS)
    lacking = [name for name in settings["files"] if not (whole / name.removesuffix(PACKED)).is_file()]
    if lacking:
        raise FileNotFoundError(f"{inputs} lacks a part of the inputs: {lacking[0]} is not there")
    return whole, settings


def _gather(options: argparse.Namespace, whole: Path) -> None:
    config = load_config(f"{'tiny' if options.tiny else 'emoji'}/{options.stage}")
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    if options.tiny:
        model = str(_toy_model(whole.parent / "toy"))
        _complete_toy(config)
    else:
        model = options.model or config.get("init_from") or "emoji"
    folder = resolve(components_folder(model))
    _keep_model(folder, whole / "model", TRAINED[options.stage])
    icons = IconSet.load(config["data"]["path"])
    _keep_icons(icons, Path(config["data"]["path"]), whole)
    if options.stage != "prior":
        _keep_embeddings(icons, config, model, whole)
    if options.stage != "draft":
        _keep_bank(options, config["data"], load_components(folder, ["tokenizer"])["tokenizer"], icons, whole)
    for wheel in sorted(options.wheels.glob("*.whl")) if options.wheels else ():
        (whole / "wheels").mkdir(exist_ok=True)
        shutil.copy(wheel, whole / "wheels")
    files = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    settings = {"stage": options.stage, "model": model, "config": config, "files": files}
    (whole / SETTINGS).write_text(json.dumps(settings, indent=1))


def _keep_model(folder: Path, kept: Path, trained: tuple[str, ...]) -> None:
    """The CLIP and the networks that are trained, in 8 bits where they are this package's, and the prior's configuration."""
    index, named = read_object(folder / "model_index.json"), {}
    for name in dict.fromkeys((*CLIP_PARTS, *trained)):
        if not (folder / name).is_dir():
            continue  # it starts anew
        shutil.copytree(folder / name, kept / name)
        named[name] = index[name]
        for file in (kept / name).glob("*.safetensors") if index[name][0].split(".")[0] in OWN else ():
            store_in_8_bits(file)
    if (folder / "prior").is_dir():
        (kept / "prior").mkdir(exist_ok=True)
        shutil.copy(folder / "prior/config.json", kept / "prior/config.json")
    (kept / "model_index.json").write_text(json.dumps({"_class_name": index["_class_name"]} | named, indent=1))


def _keep_icons(icons: IconSet, path: Path, whole: Path) -> None:
    """The icons as a dataset: their facts without the vectors, and their sprites."""
    (whole / "data").mkdir()
    facts = json.dumps([icon | {"svg": ""} for icon in icons.icons]).encode()
    (whole / "data/icons.json.gz").write_bytes(gzip.compress(facts, mtime=0))
    if (path / "words.json.gz").is_file():
        shutil.copy(path / "words.json.gz", whole / "data")
    with lzma.open(whole / f"{SPRITES}{PACKED}", "wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(icons.sprites), allow_pickle=False)


def _keep_bank(options: argparse.Namespace, data: dict[str, Any], tokenizer: Any, icons: IconSet, whole: Path) -> None:
    """The bank that was made before, or one that is made now. Raises ValueError for one of other texts or icons."""
    if options.bank is None:
        plans = options.plans or (TINY_PLANS if options.tiny else PLANS)
        build_bank(data, tokenizer, plans, processes=1 if options.tiny else 2).save(whole / BANK)
        return
    facts = PlanBank.load(options.bank).facts
    for name, found in (("tokenizer", tokenizer_fingerprint(tokenizer)), ("sprites", sprites_fingerprint(icons.sprites))):
        if facts[name] != found:
            raise ValueError(f"{options.bank} was made with the {name} {facts[name]}, but what is packed has {found}")
    shutil.copy(options.bank, whole / BANK)


def _keep_embeddings(icons: IconSet, config: dict[str, Any], model: str, whole: Path) -> None:
    """The icons' embeddings in float16: CLIP's own [N, D], and where the stage has a prior those that it samples [N, K, D]."""
    wanted = config["objective"]
    prior = model if wanted.get("prior") else None
    frozen = FrozenCLIP.load(model)
    bank = IconBank(icons, Path(config["data"]["path"]), frozen, prior, wanted.get("samples", 4), config.get("seed", 0))
    tables = {"embeds": bank.embeds()}
    if prior is not None:
        every = torch.arange(len(icons))
        chosen = ((torch.full((len(icons),), (n + 0.5) / bank.samples)) for n in range(bank.samples))
        tables["sampled"] = torch.stack([bank.sampled(every, random) for random in chosen], 1)
    save_file({name: table.half().contiguous() for name, table in tables.items()}, whole / EMBEDS)


def icon_tables(whole: Path) -> dict[str, torch.Tensor]:
    """What `_keep_embeddings` kept, in float32; {} where it did not."""
    return {name: t.float() for name, t in load_file(whole / EMBEDS).items()} if (whole / EMBEDS).is_file() else {}


def _shared_out(whole: Path) -> list[list[str]]:
    """The files of each part, the largest first wherever there is room; the settings are in the first part.

    Raises ValueError where they do not fit.
    """
    parts, sizes = [[SETTINGS], *([] for _ in range(PARTS - 1))], [(whole / SETTINGS).stat().st_size, *[0] * (PARTS - 1)]
    names = read_object(whole / SETTINGS)["files"]
    files = [(whole / name).stat().st_size for name in names]
    for size, name in sorted(zip(files, names, strict=True), reverse=True):
        part = next((n for n in range(PARTS) if sizes[n] + size <= PART_BYTES), None)
        if part is None:
            raise ValueError(f"{sum(files) / 2**20:.0f} MiB of inputs do not fit into {PARTS} parts: {name} is left over")
        parts[part].append(name)
        sizes[part] += size
    return parts


def _complete_toy(config: dict[str, Any]) -> None:
    """Have a toy configuration do what the shipped one does: a draft, grounding, sampled embeddings, one pose, Muon."""
    if config["stage"] == "decoder":
        config["model"], config["optimizer"] = load_config("tiny/draft")["model"], "muon"
        config["data"]["single_pose"] = True
        config["objective"] |= {"grounding": 0.5, "grounding_every": 2}
    if config["stage"] != "prior":
        config["objective"] |= {"prior": "toy", "samples": 2}


def _toy_model(folder: Path) -> Path:
    """A CLIP, a prior, and a decoder with a draft head, of toy width and with random weights."""
    torch.manual_seed(0)
    components = create("clip", load_config("tiny/clip"), 0).components()
    save_components(folder, components)
    for stage in ("prior", "decoder", "draft"):
        sections = load_config(f"tiny/{stage}") | ({"model": load_config("tiny/draft")["model"]} if stage != "prior" else {})
        sections["objective"]["clip"] = str(folder)
        objective = create(stage, sections, 0)
        objective.prepare()
        components |= objective.components()
    save_components(folder, components)
    return folder
