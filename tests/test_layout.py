"""The house: style, import directions, and the README's two commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(run, arguments):
    result = run("-m", "ruff", *arguments, "--no-cache", ".")
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_run_downwards_only():
    command = Path(sys.executable).with_name("lint-imports")  # of this environment, whether or not it is activated
    arguments = [command, "--no-cache", "--config", "setup.cfg"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_pipelines_import_nothing_of_training_evaluation_studio_or_server(run):
    result = run("-c", "import sys, unclip.pipelines; print(*(m for m in sys.modules if m.startswith('unclip.')))")
    packages = {module.split(".")[1] for module in result.stdout.split()}
    assert packages >= {"pipelines", "clip", "diffusion"}, result.stderr
    assert not packages & {"cli", "studio", "server", "evaluation", "training"}


def patches(source: str) -> list[str]:
    """The statements that assign to an attribute or an item of what was imported from another package, or import a mock."""
    tree = ast.parse(source)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            name = target
            while isinstance(name, ast.Attribute | ast.Subscript):
                name = name.value
            if name is not target and isinstance(name, ast.Name) and name.id in imported:
                found.append(ast.unparse(node))
        if isinstance(node, ast.Import | ast.ImportFrom) and "unittest" in ast.unparse(node):
            found.append(ast.unparse(node))
    return found


def test_nothing_of_other_libraries_is_replaced():
    """Settings by environment variables aside, which is how libraries take them."""
    found = {
        f"{path.relative_to(ROOT)}: {statement}"
        for package in ("prior", "decoder", "upsamplers", "unclip")
        for path in (ROOT / package).rglob("*.py")
        for statement in patches(path.read_text(encoding="utf-8"))
        if not statement.startswith("os.environ[")
    }
    assert not found
    for patch in ("import sys\nsys.modules['xformers'] = None", "import gradio as gr\ngr.Blocks.launch = print"):
        assert patches(patch) == [patch.splitlines()[1]]
    assert patches("from unittest import mock") == ["from unittest import mock"]


@pytest.mark.parametrize(("heading", "word"), [("Quick start", "unclip generate"), ("Tests", "pytest")])
def test_readme_has_one_line_under_each_heading(heading, word):
    text = (ROOT / "README.md").read_text()
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)
    blocks = re.findall(r"^```\w*\n(.*?)^```", section, re.M | re.S)
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) == 1
    assert word in blocks[0]


def test_ci_runs_the_readme_line():
    """`.ci/run` takes the line from the README, so that the two cannot differ."""
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_working_folders_are_ignored_and_the_data_package_is_not():
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0

    assert all(map(ignored, ["data/emoji", "runs/x", "out/y.png"]))
    assert not ignored("unclip/data/emoji.py")
