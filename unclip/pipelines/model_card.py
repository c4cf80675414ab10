"""A model card for a folder that has none: what the Hub shows of a model (its metadata are YAML before the text)."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors import safe_open

from ..io.checkpoints import read_object
from ..io.hub import CARD
from ..io.images import save_image

IMAGES = "images"  # the folder of its sample images


@dataclass
class CardFacts:
    """What a card says that a model's folder does not: its licence (an SPDX name), data, sample images and evaluation.

    `data` is text in Markdown, `images` maps prompts to images, `report` is the folder of an `unclip evaluate`.
    """

    license: str | None = None
    data: str | None = None
    images: Mapping[str, Image.Image] = field(default_factory=dict)
    report: Path | None = None


def model_card(folder: Path, name: str, facts: CardFacts) -> dict[str, bytes]:
    """The card of a model's folder and its sample images: path -> content.

    Raises ValueError for a report that is none.
    """
    index = read_object(folder / "model_index.json")
    files = {f"{IMAGES}/{number}.png": _png(image) for number, image in enumerate(facts.images.values())}
    complete = index["_class_name"] == "UnCLIPPipeline" and "decoder" in index and "prior" in index
    metadata: dict[str, Any] = {"license": facts.license} if facts.license else {}
    metadata |= {"library_name": "unclip", "tags": ["unclip", "diffusion"]}
    if complete:
        metadata["pipeline_tag"] = "text-to-image"
    if files:
        shown = zip(facts.images, files, strict=True)
        metadata["widget"] = [{"text": prompt, "output": {"url": path}} for prompt, path in shown]
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---",
        f"# {name}",
        _purpose(name, complete),
    ]
    if files:
        shown = zip(facts.images, files, strict=True)
        parts.append("## Samples\n\nFrom seed 0, not chosen.\n\n" + "\n".join(f"![{_line(p)}]({path})" for p, path in shown))
    parts.append("## Parts\n\n" + _table(("part", "class", "parameters"), _networks(folder, index)))
    parts.append("## Training data\n\n" + (facts.data or "Not stated by whoever sent this model."))
    if facts.report is not None:
        parts.append("## Evaluation\n\n" + _evaluation(facts.report))
    parts.append("## Licence\n\n" + (facts.license or "Not stated by whoever sent this model."))
    return {CARD: ("\n\n".join(parts) + "\n").encode(), **files}


def _purpose(name: str, complete: bool) -> str:
    if not complete:
        return "One stage of an unCLIP (arXiv 2204.06125), trained with `unclip train`; `unclip export` assembles stages."
    code = f'from unclip import UnCLIPPipeline\n\nUnCLIPPipeline.from_pretrained("{name}")("...").images[0].save("image.png")'
    design = "an unCLIP (arXiv 2204.06125) of CLIP, prior, decoder and upsamplers"
    return f"A text-to-image model: {design}.\n\n```python\n{code}\n```"


def _networks(folder: Path, index: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for name, entry in index.items():
        weights = sorted((folder / name).glob("*.safetensors")) if isinstance(entry, list) else []
        if weights:
            rows.append((f"`{name}`", f"`{entry[1]}`", f"{_parameters(weights) / 1e6:.1f}M"))
    return rows


def _parameters(files: Sequence[Path]) -> int:
    """How many numbers these files hold; of a network in several precisions, each once."""
    shapes: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes.values())


def _evaluation(report: Path) -> str:
    file = report / "report.json" if report.is_dir() else report
    found = read_object(file) if file.is_file() else {}
    rows = found.get("summary")
    if not rows:
        raise ValueError(f"{report} holds no report of unclip evaluate (report.json with a summary)")
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    return f"By `{found.get('command', 'unclip evaluate')}`:\n\n" + _table(columns, cells)


def _cell(value: Any) -> str:
    """A number as it is read; an estimate with its interval."""
    if isinstance(value, dict) and "value" in value:
        return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else _line(str(value))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(text: str) -> str:
    """Text that stays within one line of a table or a link."""
    return " ".join(text.split()).replace("|", "\\|").replace("[", "(").replace("]", ")")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    save_image(image, file)
    return file.getvalue()
