"""Run the tests that need no POSIX: `python tests/portable.py [OPTIONS OF PYTEST]`.

With `--without-posix` `fcntl`, `resource` and `os.fork` are taken away first, as on Windows.
"""

import builtins
import multiprocessing
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("io", "diffusion", "clip", "pipelines")
FOLDERS = ("tests/prior", "tests/decoder", "tests/upsamplers", *(f"tests/unclip/{name}" for name in PACKAGES))
FILES = ("tests/unclip/cli/test_batch.py", "tests/unclip/training/test_training.py", "tests/unclip/training/test_resume.py")


def remove_posix() -> None:
    """Take from this process what only POSIX has: the modules from this repository's code, `os.fork` from everyone.

    Libraries keep the modules: psutil and filelock have code of their own for Windows, which they choose by the system's name.
    """
    import_module = builtins.__import__

    def import_here(name: str, globals: dict | None = None, *more, **named):
        importer = Path((globals or {}).get("__file__") or "/")
        ours = importer.is_relative_to(ROOT) and "site-packages" not in importer.parts  # an environment may lie in the clone
        if name in ("fcntl", "resource") and ours:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, globals, *more, **named)

    builtins.__import__ = import_here
    del os.fork
    multiprocessing.set_start_method("spawn")


def main(options: list[str]) -> int:
    import pytest

    if "--without-posix" in options:
        options = [option for option in options if option != "--without-posix"]
        remove_posix()
    os.chdir(ROOT)
    return pytest.main(["-n", "0", *(options or (*FOLDERS, *FILES))])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
