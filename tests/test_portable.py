"""What runs on Windows and macOS: no module that only POSIX has, and text files in UTF-8 whatever the system's encoding is."""

import ast
import os
from pathlib import Path

import pytest
from conftest import ROOT

TRAIN_AND_PLAN = """
import sys
sys.path.insert(0, "tests")

def main():
    import portable
    portable.remove_posix()
    from unclip import cli
    from unclip.training.trainer import train
    train("configs/tiny/upsampler_256.yaml", ["max_steps=2", "sample_every=0", "workers=1", f"output_dir={sys.argv[1]}"])
    sys.argv = ["unclip", "plan", "tiny/upsampler_256", "--gpus", "0"]
    cli.main()

if __name__ == "__main__":
    main()
"""


def test_train_and_plan_start_where_there_is_no_fcntl(run, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TRAIN_AND_PLAN)
    result = run(script, tmp_path / "run", env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "final").rglob("*.safetensors")) and "trained parameters" in result.stdout


@pytest.mark.slow
def test_the_portable_tests_pass_without_posix(run):
    result = run("tests/portable.py", "--without-posix", timeout=3600)
    assert result.returncode == 0, result.stdout


def unnamed_encodings(source: str) -> list[int]:
    """The lines that read or write text without naming its encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in ("read_text", "write_text"):
            lines.append(node.lineno)
        if isinstance(called, ast.Name) and called.id == "open":
            mode = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else "r"
            lines += [] if "b" in mode else [node.lineno]
    return lines


def test_text_without_an_encoding_is_found():
    assert unnamed_encodings("p.read_text()\np.write_text(x)\nopen(p)\nopen(p, 'a')\n") == [1, 2, 3, 4]
    assert not unnamed_encodings("p.read_text(encoding='utf-8')\nopen(p, 'rb')\nImage.open(p)\n")


@pytest.mark.parametrize("folder", ["unclip", "prior", "decoder", "upsamplers"])
def test_text_files_are_utf_8_on_every_system(folder):
    """Windows would take its own encoding, which has no emoji."""
    found = {
        str(p.relative_to(ROOT)): unnamed_encodings(p.read_text(encoding="utf-8")) for p in Path(ROOT, folder).rglob("*.py")
    }
    assert not {path: lines for path, lines in found.items() if lines}
