"""Hooks of mkdocs: pages that are made of other files of the repository, and the configuration reference from the code.

A line `<!-- include: PATH -->` becomes the Markdown file at PATH (from the repository's root), and `<!-- configuration -->` the
reference of all configuration keys.
"""

import dataclasses
import inspect
import posixpath
import re
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the clone that the documentation belongs to, installed or not

from unclip.training.objectives import STAGES  # noqa: E402 - it lies in that clone

OBJECTIVES = "unclip.training.objectives."
NETWORKS = {  # section of a configuration -> the classes that it fills
    "model (clip)": ("unclip.clip.towers.TextTower", "unclip.clip.towers.ImageTower"),
    "model (prior)": ("prior.DiffusionPrior",),
    "model (prior_autoregressive)": ("prior.AutoregressivePrior",),
    "model (decoder)": ("decoder.Decoder", "decoder.UnCLIPTextProjModel"),
    "model (upsampler_256, upsampler_1024)": ("upsamplers.Upsampler",),
}
FIXED = {"self", "model", "data", "seed", "args", "kwargs"}  # parameters that are no keys of the section


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what a page's marks stand for."""
    source = page.file.src_uri
    markdown = re.sub(r"^<!-- include: (\S+) -->$", lambda mark: included(ROOT / mark[1], source), markdown, flags=re.M)
    return markdown.replace("<!-- configuration -->", configuration()) if "<!-- configuration -->" in markdown else markdown


def included(path: Path, page: str) -> str:
    """The Markdown file `path`, without its front matter, with its links to files under docs/ as links from `page`."""
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(), flags=re.S)
    folder = path.parent.relative_to(ROOT).as_posix()

    def link(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        if target.startswith("docs/"):
            return f"{found[1]}({posixpath.relpath(target[5:], posixpath.dirname(page) or '.')}{found[3] or ''})"
        return f"{found[1]}" if not found[1].startswith("!") else found[0]  # not in the site: the words alone

    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", link, text)


def configuration() -> str:
    """Every key of a configuration with its default, read off dataclasses and signatures."""
    from unclip.training.config import TrainConfig

    parts = ["## The run\n\nKeys at the top level of the file.\n", fields(TrainConfig)]
    for stage, path in STAGES.items():
        objective = imported(OBJECTIVES + path)
        parts += [f"## objective ({stage})\n\n{summary(objective)}\n", parameters(objective)]
    for section, paths in NETWORKS.items():
        for path in paths:
            made = imported(path)
            parts += [f"## {section}: {made.__name__}\n\n{summary(made)}\n", parameters(made)]
    return "\n".join(parts)


def imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def summary(made: Callable) -> str:
    """The first paragraph of a docstring."""
    return inspect.getdoc(made).split("\n\n")[0].replace("\n", " ")


def fields(made: type) -> str:
    """A table of a dataclass's fields, with the comments behind them."""
    said = comments(made)
    rows = [
        (field.name, shown(field.type), default(field.default, dataclasses.MISSING), said.get(field.name, ""))
        for field in dataclasses.fields(made)
    ]
    return table(("key", "type", "default", ""), rows)


def parameters(made: Callable) -> str:
    """A table of the parameters that a section may set."""
    chosen = [p for p in inspect.signature(made).parameters.values() if p.name not in FIXED]
    return table(("key", "type", "default"), [(p.name, shown(p.annotation), default(p.default, p.empty)) for p in chosen])


def comments(made: type) -> dict[str, str]:
    """The comment behind each `name: type` line of a class."""
    lines = iter(inspect.getsourcelines(made)[0])
    found: dict[str, str] = {}
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        name = re.match(r"\s+(\w+):", token.line)
        if token.type == tokenize.COMMENT and name:
            found[name[1]] = token.string.lstrip("# ")
    return found


def shown(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    return "" if annotation is inspect.Parameter.empty else f"`{text.replace('typing.', '')}`"


def default(value: Any, missing: Any) -> str:
    return "required" if value is missing else f"`{value!r}`"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first column as code."""
    lines = [head, ("---",) * len(head), *((f"`{row[0]}`", *row[1:]) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
