"""Run mypy and compare each package's number of errors with scripts/type_errors.json: `python scripts/check_types.py`.

Exits with 1 where a package has more errors than its stored count, or fewer: counts only fall, and `--lower` stores what
was found. A package that is not in the file must have none. Errors are printed of the packages that have too many.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "scripts" / "type_errors.json"


def package_of(path: str) -> str:
    """The package that a file's errors count for: `unclip/server` of `unclip/server/app.py`, `prior` of `prior/model.py`."""
    parts = Path(path).parts
    return "/".join(parts[: 2 if parts[0] == "unclip" and len(parts) > 2 else 1])


def errors_by_package(output: str) -> dict[str, list[str]]:
    """The error lines of mypy's output, by package."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in output.splitlines():
        if match := re.match(r"([^:]+\.py):\d+: error: ", line):
            found[package_of(match[1])].append(line)
    return dict(found)


def differences(found: Mapping[str, int], allowed: Mapping[str, int]) -> list[str]:
    """One line for each package whose number of errors is not the stored one."""
    lines = []
    for package in sorted(found.keys() | allowed.keys()):
        now, before = found.get(package, 0), allowed.get(package, 0)
        if now > before:
            lines.append(f"{package}: {now} type errors, {before} allowed")
        elif now < before:
            lines.append(f"{package}: {now} type errors, fewer than the stored {before}: run scripts/check_types.py --lower")
    return lines


def lowered(found: Mapping[str, int], allowed: Mapping[str, int]) -> dict[str, int]:
    """The stored counts, each lowered to what was found; packages without errors are left out."""
    counts = {package: min(count, found.get(package, 0)) for package, count in allowed.items()}
    return {package: count for package, count in sorted(counts.items()) if count}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", action="store_true", help="store the counts that have fallen")
    options = parser.parse_args(arguments)
    ended = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode not in (0, 1):  # 1: errors were found
        print(ended.stdout + ended.stderr, file=sys.stderr)
        return ended.returncode
    errors = errors_by_package(ended.stdout)
    found = {package: len(lines) for package, lines in errors.items()}
    allowed = json.loads(BASELINE.read_text())
    if options.lower:
        allowed = lowered(found, allowed)
        BASELINE.write_text(json.dumps(allowed, indent=2) + "\n")
    for package, lines in sorted(errors.items()):
        if len(lines) > allowed.get(package, 0):
            print("\n".join(lines))
    failures = differences(found, allowed)
    print("\n".join(failures) if failures else f"{sum(found.values())} type errors, as stored")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
