"""The versions of dependencies: open ranges in setup.cfg, one tested set in constraints.txt, and what ran on what."""

import re
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONFIG = ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = CONFIG["options.extras_require"]
VERSIONS = (ROOT / "docs/development.md").read_text(encoding="utf-8").split("## Versions")[1].split("\n## ")[0]


def requirements(*extras: str) -> list[Requirement]:
    """What the package needs, with these extras."""
    lines = "\n".join([CONFIG["options"]["install_requires"], *(EXTRAS[name] for name in extras)])
    return [Requirement(line) for line in lines.splitlines() if line]


def pins() -> dict[str, str]:
    """Package -> the version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines if not x.startswith("#"))}


@pytest.mark.parametrize("requirement", requirements(*EXTRAS), ids=str)
def test_versions_have_a_floor_and_no_cap(requirement):
    """A cap would downgrade what an environment has."""
    assert [specifier.operator for specifier in requirement.specifier] == [">="]


@pytest.mark.parametrize("requirement", requirements("app", "train", "test"), ids=str)
def test_what_the_readme_installs_is_pinned_within_its_range(requirement):
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_the_pinned_torch_has_a_build_without_cuda():
    """A pin with a local version (+cpu) or a version without that build would install gigabytes, or nothing."""
    assert pins()["torch"] == "2.13.0"


def test_both_commands_of_the_readme_install_the_tested_set():
    lines = [x for x in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "pip install" in x]
    assert len(lines) == 2 and all("-c constraints.txt" in line for line in lines)
    assert "include constraints.txt" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8"), "the sdist has the README too"


def test_classifiers_name_the_pythons_that_ran():
    listed = re.findall(r"Python :: (3\.\d+)", CONFIG["metadata"]["classifiers"])
    ran = {row.split("|")[1].strip() for row in VERSIONS.splitlines() if re.match(r"\| 3\.\d+ ", row)}
    assert listed == sorted(ran, key=lambda version: int(version[2:]))


def test_floors_are_the_oldest_versions_that_ran():
    """The first row of the table has the floors of the libraries that change most."""
    (row,) = (x for x in VERSIONS.splitlines() if re.match(r"\| 3\.\d+ ", x) and "(floors)" in x)
    cells = [cell.split()[0] for cell in row.strip("|").split("|")][1:5]
    floors = {r.name: next(iter(r.specifier)).version for r in requirements()}
    for name, ran in zip(("torch", "transformers", "huggingface_hub", "diffusers"), cells, strict=True):
        assert ran.split(".")[:2] == floors[name].split("."), name


def test_the_workflow_runs_every_python_and_every_system():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert set(jobs["portable"]["strategy"]["matrix"]["system"]) == {"windows-latest", "macos-latest"}
