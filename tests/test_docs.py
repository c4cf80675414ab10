"""The documentation: complete, generated from the code as it is, and built without a warning and without a network."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

DOCS = ROOT / "docs"


def loaded(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pages() -> list[str]:
    """The pages that the navigation names."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [page for section in nav for pages in section.values() for page in pages]


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages()) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_figures_are_what_the_script_draws():
    figures = loaded("figures")
    assert len(figures.FIGURES) >= 6
    for name, draw in figures.FIGURES.items():
        assert (DOCS / "figures" / f"{name}.svg").read_text() == draw()


def test_the_configuration_reference_has_every_stage_and_every_key():
    from unclip.runtime.config import CONFIGS, ConfigError, load_config
    from unclip.training.config import TrainConfig
    from unclip.training.objectives import create

    hooks = loaded("hooks")
    reference = hooks.configuration()
    with pytest.raises(ConfigError) as error:
        create("nothing", {}, 0)
    assert str(error.value).partition("choose from ")[2].split(", ") == list(hooks.STAGES)
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", reference, re.M | re.S))
    for field in dataclasses.fields(TrainConfig):
        assert f"| `{field.name}` |" in sections["The run"]
    assert "| `cooldown` | `float` | `0.2` | the last share of the steps" in sections["The run"]
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        config = load_config(path)
        for key in config.get("objective") or {}:
            assert f"| `{key}` |" in sections[f"objective ({config['stage']})"], (path, key)


def test_pages_include_files_with_links_that_fit(tmp_path):
    hooks = loaded("hooks")
    contributing = hooks.included(ROOT / "CONTRIBUTING.md", "contributing.md")
    assert "](tests.md)" in contributing and "](docs/" not in contributing
    assert "](growth.png)" in hooks.included(ROOT / "benchmarks" / "README.md", "performance.md")
    assert hooks.included(ROOT / "unclip/pretrained/emoji/README.md", "model_card.md").lstrip().startswith("# ")


def test_commands_in_the_pages_exist():
    """Each `unclip COMMAND --option` of an indented block names a command and options that are there."""
    import typer

    from unclip import cli

    known = typer.main.get_command(cli.app).commands
    found = 0
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for line in re.sub(r"\\\n\s+", "", page.read_text()).splitlines():
            words = re.match(r" {4}unclip (\S.*)", line)
            if not words:
                continue
            parts = words[1].partition("#")[0].split()
            command = known.get(parts[0])
            assert command is not None, f"{page.name}: {line}"
            if hasattr(command, "commands"):
                command = command.commands.get(parts[1])
                assert command is not None, f"{page.name}: {line}"
            options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
                "--help"
            }
            given = {part for part in parts[1:] if re.fullmatch(r"--[a-z][\w-]*|-[a-z]", part)}
            assert given <= options, f"{page.name}: {line}: {given - options}"
            found += 1
    assert found > 40


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    offline = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | offline)
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "index.html").read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', html)
    assert "whitening_examples" in (tmp_path / "configuration" / "index.html").read_text()
