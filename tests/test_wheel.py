"""The package as people install it, without a clone."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT


def test_what_is_built_holds_the_configurations_and_every_module(tmp_path):
    """The files that the wheel is packed from; the shipped weights are looked for, not copied."""
    (tmp_path / "unclip" / "pretrained").mkdir(parents=True)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for folder, pattern, inside in (
        ("configs", "*/*.yaml", "unclip/configs"),
        *((room, "**/*.py", room) for room in ("unclip", "prior", "decoder", "upsamplers")),
    ):
        expected = {p.relative_to(ROOT / folder) for p in (ROOT / folder).glob(pattern)}
        found = {p.relative_to(tmp_path / inside) for p in (tmp_path / inside).glob(pattern)}
        assert expected and expected == found
    assert list((tmp_path / "unclip" / "pretrained").rglob("*.safetensors"))


@pytest.mark.slow
def test_the_wheel_draws_and_trains_without_a_clone(tmp_path):
    """A virtual environment that has the dependencies of this one and of this package nothing but the wheel."""

    def run(*command: str | Path) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        result = subprocess.run(
            [*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", next(tmp_path.glob("*.whl")))
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files stay unread
    assert run(python, "-c", "import unclip; print(unclip.__file__)").strip() == str(packages / "unclip" / "__init__.py")
    unclip = tmp_path / "venv" / "bin" / "unclip"
    drawn = run(unclip, "generate", "a red apple", "--out", "apple.png", "--size", "64", "--steps", "2")
    assert drawn.strip() == "apple.png" and (tmp_path / "apple.png").is_file()
    run(unclip, "train", "tiny/upsampler_256", "max_steps=2", "sample_every=0", "output_dir=run")
    run(unclip, "train", "configs/tiny/upsampler_256.yaml", "max_steps=2", "sample_every=0", "output_dir=again")
    assert list((tmp_path / "run" / "final").rglob("*.safetensors"))
    assert "trained parameters" in run(unclip, "plan", "tiny/upsampler_256", "--gpus", "0")
