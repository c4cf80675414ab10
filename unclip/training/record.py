"""What a run is configured with, kept beside its checkpoints, and how a resumed run differs from it."""

import hashlib
import importlib.metadata
import inspect
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..io.checkpoints import write_beside
from ..runtime.config import ConfigError
from .config import TrainConfig
from .objectives import Objective

FILE = "config.yaml"
LIBRARIES = ("unclip", "torch", "diffusers", "transformers", "accelerate")
# Keys that change no weight: where results go, how often, and from where the same things are read.
UNIMPORTANT = {"output_dir", "workers", "log_every", "save_every", "save_minutes", "keep", "validate_every", "sample_every"}
UNIMPORTANT |= {
    "init_from",
    "report_to",
    "push_to_hub",
    "profile_steps",
    "resume_changed",
    "max_steps",
    "data.path",
    "data.embeddings",
}
UNIMPORTANT |= {"push_to_hub", "data.max_unreadable", "objective.clip", "objective.prior", "objective.adapter"}
REFUSED = ("stage", "seed", "data_fingerprint", "clip_fingerprint", "model.sample_size")  # and all of data and objective


def run_record(config: TrainConfig, sections: Mapping[str, Mapping[str, Any]], objective: Objective) -> dict[str, Any]:
    """The resolved configuration, the versions of the libraries, the commit, and fingerprints of the data and of the CLIP.

    `configuration` has the defaults of the run and of the objective filled in.
    """
    parameters = inspect.signature(type(objective)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    configuration = asdict(config) | dict(sections) | {"objective": defaults | dict(sections["objective"])}
    record = {
        "configuration": configuration,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
        "data_fingerprint": data_fingerprint(str(sections["data"].get("path", ""))),
        "clip_fingerprint": getattr(getattr(objective, "frozen", None), "fingerprint", None),
    }
    return json.loads(json.dumps(record, default=str))


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `config.yaml`: the configuration, as a file that trains the same again, under the other facts as comments."""
    facts = {key: value for key, value in record.items() if key != "configuration"}
    comments = "".join(f"# {line}\n" for line in yaml.safe_dump(facts, sort_keys=False).splitlines())
    text = comments + yaml.safe_dump(dict(record["configuration"]), sort_keys=False)
    write_beside(folder / FILE, lambda partial: partial.write_text(text, encoding="utf-8"))


def recorded_stage(folder: Path) -> str | None:
    """The stage that was trained in `folder`, where its `config.yaml` says it."""
    path = folder / FILE
    return yaml.safe_load(path.read_text(encoding="utf-8")).get("stage") if path.is_file() else None


def check_resumed(before: Mapping[str, Any], now: Mapping[str, Any], origin: str, allowed: bool) -> list[str]:
    """The settings that a resumed run changes, each as "key: before -> now".

    Raises ConfigError for another dataset, CLIP, seed, objective or resolution, unless that is `allowed`.
    """
    found = {key: f"{key}: {old!r} -> {new!r}" for key, old, new in _differences(_flat(before), _flat(now))}
    refused = [line for key, line in found.items() if key in REFUSED or key.startswith(("data.", "objective."))]
    if refused and not allowed:
        listed = "; ".join(refused)
        raise ConfigError(
            f"{origin} was trained with other settings ({listed}): choose another output_dir, or resume_changed=true"
        )
    return list(found.values())


def data_fingerprint(path: str) -> str:
    """Names the content of a dataset: of emoji icons their list, of a folder its files' names and sizes; else `path`."""
    folder, digest = Path(path), hashlib.sha256()
    if not path or not folder.is_dir():
        return path
    icons = folder / "icons.json.gz"
    if icons.is_file():
        digest.update(icons.read_bytes())
    else:
        files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and p.suffix != ".partial")
        for file in sorted(files):
            digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and fingerprints by their keys, those of sections as "section.key"."""
    flat = {key: record.get(key) for key in ("data_fingerprint", "clip_fingerprint")}
    for key, value in record["configuration"].items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys whose values differ.

    A key that only one of them has was added or removed by another version of this package, except in the sections whose
    defaults are not recorded.
    """
    for key in sorted(before.keys() | now.keys()):
        is_new = key not in before or key not in now
        if key in UNIMPORTANT or (is_new and not key.startswith(("data.", "model."))):
            continue
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the clone that this package is in, with "-dirty" after it if files were changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
