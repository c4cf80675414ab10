"""The emoji dataset's builder, on packages in the sources' own layout."""

import json

import numpy as np
import pytest
from datasets import load_from_disk
from wordnet import write_words

from unclip.clip.model import CLIP
from unclip.data import emoji
from unclip.data.emoji import NAMES, build, read_icons, slug
from unclip.data.icon_packages import SOURCES
from unclip.data.scenes import IconSet
from unclip.data.shapes import SHAPES
from unclip.data.words import Vocabulary, Words

COLOUR = {"noto": "#e2453c", "flat": "#3b7de0", "3d": "#2fae54", "twemoji": "#f0b429"}


@pytest.fixture
def packages(tmp_path):
    """Seven small packages: every shape in four styles, one with skin tones, one icon that no name knows, and words."""
    folder = tmp_path / "emoji"
    for package, version, style, *_ in SOURCES:
        root = folder / "npm" / f"{package.lstrip('@').replace('/', '-')}-{version}"
        root.mkdir(parents=True)
        bodies = {name: f'<g fill="{COLOUR[style]}">{body}</g>' for name, body in SHAPES.items()}
        bodies |= {
            "star-dark-skin-tone": bodies["star"],
            "star-dark": bodies["star"],
            "nameless": bodies["dot"],
            "empty": "<g/>",
        }
        icons = {"width": 100, "height": 100, "icons": {name: {"body": body} for name, body in bodies.items()}}
        (root / "icons.json").write_text(json.dumps(icons))
        (root / "package.json").write_text("{}")
    names = folder / "npm" / "-".join(NAMES)
    (names / "en").mkdir(parents=True)
    (names / "package.json").write_text("{}")
    (names / "en" / "messages.json").write_text(json.dumps({"groups": [{"order": 0, "key": "objects"}]}))
    labels = [*SHAPES, "empty"]
    data = [{"label": n, "emoji": chr(0x2600 + k), "group": 0, "tags": ["figure", f"{n}let", n]} for k, n in enumerate(labels)]
    (names / "en" / "data.json").write_text(json.dumps(data))
    keywords = {chr(0x2600 + labels.index("ring")): ["hoop", "kitty"]}
    write_words(
        folder / "npm",
        ['star 06 | a plane figure with points; "a star"; "ring of stars"'],
        keywords,
        used=["meadow%1 9", "red%3 9"],
    )
    return folder


def test_names(tmp_path):
    assert slug("Smiling face: with Heart-Eyes!") == "smiling-face-with-heart-eyes"
    assert slug("piñata") == "pinata" and slug("woman’s hat") == "womans-hat" and slug("a & b") == "a-and-b"


def test_icons_carry_their_names_tags_and_tones(packages):
    icons = list(read_icons(packages / "npm"))
    assert {i.concept for i in icons} == {*SHAPES, "empty"}
    star = [i for i in icons if i.concept == "star"]
    assert sorted(i.tone for i in star) == ["", "", "", "", *["dark"] * 8]
    assert star[0].tags == ["figure", "starlet"]
    assert {i.licence for i in icons} == {"Apache-2.0", "MIT", "CC-BY-4.0"}


def test_build_is_deterministic_and_complete(packages, tmp_path):
    counts = build(packages, log=lambda _: None, scenes=12)
    built = load_from_disk(str(packages))
    assert set(built) == {"train", "validation", "test"}
    assert {s: sum(c.values()) for s, c in counts.items()} == {s: len(built[s]) for s in built}
    concepts = {s: set(built[s].filter(lambda r: r["kind"] == "icon")["concept"]) for s in built}
    assert "empty" not in set().union(*concepts.values())  # draws nothing
    assert "gem" in concepts["validation"] and "gem" not in concepts["train"]
    card = (packages / "README.md").read_text()
    assert all(source[0] in card and source[3] in card for source in SOURCES)
    row = built["test"][0]
    assert row["svg"].startswith("<svg") and row["captions"] and row["split"] == "test"

    said = {"star": Words(sayings=["plane figure with points"]), "ring": Words(names=["hoop"])}
    assert IconSet.load(packages).words == Vocabulary(said, ["meadow"], [])  # no word that the evaluation or a scene says
    files = {name: (packages / name).read_bytes() for name in ("icons.json.gz", "words.json.gz", "sprites-64.npy", "README.md")}
    rows = {s: list(built[s]) for s in built}
    with pytest.raises(FileExistsError, match="--force"):
        build(packages, log=lambda _: None)
    build(packages, log=lambda _: None, scenes=12, force=True)
    assert files == {name: (packages / name).read_bytes() for name in files}
    assert rows == {s: list(load_from_disk(str(packages))[s]) for s in rows}


def test_english_phrases_are_assigned_to_concepts(packages, tiny_folder, command):
    code, _, errors = command("data", "phrases", tiny_folder, "--data", packages)
    assert code == 2 and errors.count("\n") == 1 and f"unclip data emoji --out {packages} --force" in errors
    build(packages, log=lambda _: None, scenes=2)
    code, said, errors = command("data", "phrases", tiny_folder, "--data", packages)
    assert code == 0, errors
    found = {concept: words.heard for concept, words in IconSet.load(packages).words.of.items() if words.heard}
    assert sorted(p for heard in found.values() for p in heard) == [
        "a star",
        "plane figure with points",
        "ring of stars",
        "star",
    ]
    assert said == f"4 phrases are assigned to {len(found)} concepts\n"
    assert IconSet.load(packages).words.of["ring"].names == ["hoop"]  # as before
    first = (packages / "words.json.gz").read_bytes()
    CLIP.from_pretrained(tiny_folder).save_pretrained(packages / "run" / "final")
    for model in (tiny_folder, packages / "run"):
        assert command("data", "phrases", model, "--data", packages)[0] == 0
        assert (packages / "words.json.gz").read_bytes() == first
    code, _, errors = command("data", "phrases", tiny_folder, "--data", packages, "--device", "nowhere")
    assert code == 2 and errors.count("\n") == 1 and "device 'nowhere' cannot be used" in errors


def test_without_npm_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm was not found; install Node.js"):
        build(tmp_path)


def test_sprites_are_rendered_in_order(packages):
    svgs = [i.svg for i in list(read_icons(packages / "npm"))[:5]]
    sprites = emoji.render_sprites(svgs, processes=2)
    assert all(np.array_equal(sprites[n], emoji.render_svg(svg, 64)) for n, svg in enumerate(svgs))
