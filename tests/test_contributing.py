"""CONTRIBUTING.md and .github: the examples run, the files that are named exist, the workflows are valid."""

import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from safetensors.torch import load_file

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def example(name: str) -> str:
    """The code block of CONTRIBUTING.md that is marked with `name`."""
    return re.search(rf"^<!-- example: {name} -->\n```\w+\n(.*?)^```", GUIDE, re.M | re.S)[1]


@pytest.fixture
def module(monkeypatch):
    """call(name, source) -> a module of that name, imported from `source` for the length of the test."""

    def call(name: str, source: str):
        made = module_from_spec(spec_from_loader(name, loader=None))
        made.__package__ = name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, name, made)
        exec(compile(source, name, "exec"), made.__dict__)
        return made

    return call


def test_the_sampler_of_the_guide_samples(tiny_folder):
    source = example("sampler")
    namespace: dict = {}
    assert source.count('"emoji"') == 1
    exec(source.replace('"emoji"', repr(str(tiny_folder))), namespace)
    assert namespace["image"].size == (64, 64)
    assert type(namespace["pipe"].decoder_scheduler).__name__ == "UniPCMultistepScheduler"


def test_the_stage_of_the_guide_trains(module, tiny_folder, tmp_path, monkeypatch):
    from unclip.runtime.config import construct
    from unclip.training import trainer

    stage = module("unclip.training.objectives.linear_prior", example("stage")).LinearPriorObjective

    def create(name, sections, seed):
        assert name == "linear_prior"
        rest = {"model": sections.get("model", {}), "data": sections["data"], "seed": seed}
        return construct(stage, sections["objective"], "objective", **rest)

    monkeypatch.setattr(trainer, "create", create)
    config = tmp_path / "linear_prior.yaml"
    config.write_text(example("stage configuration"))
    trainer.train(config, [f"objective.clip={tiny_folder}", f"output_dir={tmp_path / 'run'}", "log_every=1", "warmup_steps=1"])
    losses = [float(loss) for loss in re.findall(r'"loss": ([\d.e-]+)', (tmp_path / "run" / "log.jsonl").read_text())]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    assert set(load_file(tmp_path / "run" / "final" / "linear.safetensors")) == {"weight", "bias"}


def test_the_tool_of_the_guide_draws(module, command, tiny_folder, tmp_path, monkeypatch):
    from PIL import Image

    from unclip import cli
    from unclip.io.images import read_facts

    module("unclip.pipelines.average", example("tool"))
    made = module("unclip.cli.average", example("command"))
    registered = list(cli.app.registered_commands)
    monkeypatch.setattr(cli.app, "registered_commands", registered)
    cli.app.command()(made.average)
    files = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for file in files:
        Image.new("RGB", (64, 64), file.stem).save(file)
    out = tmp_path / "out.png"
    assert command("average", *files, "--out", out, "--size", 64, "--model", tiny_folder)[:2] == (0, f"{out}\n")
    assert read_facts(out.read_bytes(), "out.png")["average_of"] == "red.png blue.png"
    assert command("average", *files, "--out", out, "--model", tiny_folder)[0] == 2  # is there already


def test_what_the_guide_names_is_there():
    paths = set(re.findall(r"`((?:unclip|tests|configs|docs|\.github)/[\w./-]+)`", GUIDE)) | set(
        re.findall(r"\]\((\w[\w/]*\.\w+)\)", GUIDE)
    )
    to_be_made = {"unclip/training/objectives/linear_prior.py", "unclip/pipelines/average.py"}
    missing = {path for path in paths - to_be_made if not (ROOT / path).exists()}
    assert len(paths) > 10 and not missing
    for module, name in (
        ("pipelines.samplers", "SAMPLERS"),
        ("cli.options", "Sampler"),
        ("cli", "sampling"),
        ("io.moved", "MODULES"),
    ):
        assert hasattr(import_module(f"unclip.{module}"), name), f"CONTRIBUTING.md names {name} in unclip.{module}"
    for name in re.findall(r"\bmake ([\w-]+)", GUIDE):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M), f"CONTRIBUTING.md names make {name}"


def is_valid(schema: str, *paths: Path) -> bool:
    """Whether files fit a schema that check-jsonschema brings along."""
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("schema", "paths", "key"),
    [
        ("github-issue-forms", [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"], "body:"),
        ("github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"], "blank_issues_enabled:"),
        ("citation-file-format", ["CITATION.cff"], "cff-version:"),
    ],
)
def test_templates_and_citation_are_valid(schema, paths, key, tmp_path):
    assert is_valid(schema, *(ROOT / path for path in paths))
    broken = tmp_path / "broken.yml"
    broken.write_text((ROOT / paths[0]).read_text().replace(key, "misspelt:"))
    assert not is_valid(schema, broken)


def test_the_workflows_are_valid(tmp_path):
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {f.stem for f in files} == {"tests", "lint", "docs", "release"}
    assert is_valid("github-workflows", *files)
    broken = tmp_path / "broken.yml"
    broken.write_text((ROOT / ".github/workflows/tests.yml").read_text().replace("runs-on:", "runs_on:"))
    assert not is_valid("github-workflows", broken)
    for file in files:
        for target in re.findall(r"run: make ([\w -]+?)(?: \w+=.*)?$", file.read_text(), re.M):
            assert all(re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M) for name in target.split()), file


def test_versions_agree():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_packages_are_typed():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for package in ("prior", "decoder", "upsamplers", "unclip"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in config["options.package_data"][package].split()
