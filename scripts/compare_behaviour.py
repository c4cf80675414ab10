"""Compare the behaviour of this working tree with that of a commit: `python scripts/compare_behaviour.py BASE`.

Both run on this machine, in processes of their own, by public entry points only (`python -m unclip`, `train.py`, the names that
`unclip` exports), with tiny checkpoints that BASE trained. Compared are

- options: every command's parameters with their defaults, and the signatures of the exported names
- training: weights, optimizer state, log and samples of each tiny stage, of a new run and of BASE's run resumed
- losses: the loss of each of 20 steps of every tiny stage, which may differ by 1e-4 of it
- tools: the images, tensors and texts that every tool writes at 64 px
- server: status codes, keys and images of a few requests

Texts that people read (help, error messages) may differ. What BASE answered is kept in `out/compare_behaviour/` for the next
comparison with it by the same scripts. Exits with 1 where anything differs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("options", "training", "losses", "tools", "server")
TOLERANCE = 1e-4  # of a loss
IGNORED = (".lock",)  # names the process that trained


def differences(base: Path, tree: Path) -> Iterator[str]:
    """What is not the same in two folders of answers, one line a file."""
    names = {
        p.relative_to(folder) for folder in (base, tree) for p in folder.rglob("*") if p.is_file() and p.name not in IGNORED
    }
    for name in sorted(names):
        one, other = base / name, tree / name
        if not (one.is_file() and other.is_file()):
            yield f"{name}: only in {'BASE' if one.is_file() else 'the working tree'}"
        elif name.suffix == ".safetensors":
            yield from (f"{name}: {difference}" for difference in _tensor_differences(one, other))
        elif name.name.endswith(".answer.json"):
            yield from (f"{name}: {difference}" for difference in _answer_differences(one, other))
        elif name.name.endswith(".curve.json"):
            yield from (f"{name}: {difference}" for difference in _curve_differences(one, other))
        elif name.name == "model_index.json":
            if _classes(one) != _classes(other):  # their modules may move
                yield f"{name}: {_classes(one)} and {_classes(other)}"
        elif one.read_bytes() != other.read_bytes():
            yield f"{name}: differs"


def _classes(path: Path) -> dict[str, Any]:
    return {k: v[1] if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}


def _answer_differences(one: Path, other: Path) -> Iterator[str]:
    first, second = (json.loads(p.read_text()) for p in (one, other))
    for key in ("code", "stdout"):
        if first[key] != second[key]:
            yield f"{key}: {first[key]!r} and {second[key]!r} {second['stderr'][-500:]}"


def _curve_differences(one: Path, other: Path) -> Iterator[str]:
    first, second = (json.loads(p.read_text()) for p in (one, other))
    if len(first) != len(second):
        yield f"{len(first)} and {len(second)} losses"
    for step, (a, b) in enumerate(zip(first, second, strict=False), 1):
        if not abs(a - b) <= TOLERANCE * abs(a):
            yield f"the loss of step {step} is {a} and {b}"
            return


def _tensor_differences(one: Path, other: Path) -> Iterator[str]:
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            yield f"{name} is only in {'BASE' if name in first else 'the working tree'}"
        elif first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name]):
            yield f"{name} differs"


def run_tree(root: Path, out: Path, fixed: Path, parts: list[str]) -> None:
    """Write the answers of the package at `root` to `out`; it trains the checkpoints in `fixed` if they are not there."""
    words = [ROOT / "scripts" / "behaviour.py", out, fixed, *parts]
    cache = {"XDG_CACHE_HOME": str(out / "cache")}  # of the search index
    settings = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, *words], cwd=root, env=os.environ | settings | cache, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{root} could not be run: exit code {ended.returncode}")


def answers_of(base: str, parts: list[str]) -> Path:
    """The folder that keeps BASE's answers, after running the parts that it lacks."""
    found = subprocess.run(["git", "rev-parse", f"{base}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=True)
    commit = found.stdout.strip()
    asking = hashlib.sha256((ROOT / "scripts" / "behaviour.py").read_bytes()).hexdigest()[:8]
    kept = ROOT / "out" / "compare_behaviour" / f"{commit[:12]}-{asking}"
    lacking = [part for part in parts if not (kept / part).is_dir()]
    if lacking:
        print(f"BASE {commit[:12]}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as place, worktree(commit, Path(place) / "base") as root:
            run_tree(root, Path(place) / "answers", kept / "fixed", lacking)
            for part in lacking:
                shutil.move(Path(place) / "answers" / part, kept / part)
    return kept


def compare(base: str, parts: list[str]) -> int:
    """Print what differs; -> the number of differences."""
    kept, count = answers_of(base, parts), 0
    print("working tree", file=sys.stderr)
    with tempfile.TemporaryDirectory() as place:
        run_tree(ROOT, Path(place), kept / "fixed", parts)
        for part in parts:
            found = list(differences(kept / part, Path(place) / part))
            files = sum(p.is_file() for p in (kept / part).rglob("*"))
            print(f"{part}: {files} files, {len(found)} differences")
            for line in found:
                print(f"  {line}")
            count += len(found)
    return count


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit in a folder of their own."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="A commit.")
    parser.add_argument("--only", action="append", choices=PARTS, help="Compare these parts; may be given several times.")
    options = parser.parse_args()
    sys.exit(1 if compare(options.base, options.only or list(PARTS)) else 0)


if __name__ == "__main__":
    main()
