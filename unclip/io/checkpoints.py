"""Folders of safetensors: training checkpoints, written atomically, and the components of a pipeline."""

import copy
import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.memory import readable_size
from .hub import fetch
from .moved import class_module

# The statistics that whiten a prior's embeddings; where they are missing, diffusers keeps the defaults without an error.
STATISTICS = ("clip_mean", "clip_std")
OWN = ("prior", "decoder", "upsamplers", "unclip")  # this package's top-level modules, in a model_index.json
PRETRAINED = Path(__file__).parents[1] / "pretrained"
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model")


# ---------------------------------------------------------------------------------------------- training


class DiskFull(OSError):
    """There is no room for a file; the message is one line that says how much is missing."""


def write_beside(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file atomically: `save` writes `{path}.partial`, which is then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        save(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file` with the permissions of the umask: safetensors itself makes files that only the owner reads."""
    save_file(dict(tensors), path, metadata)
    make_readable(path)


def make_readable(path: Path) -> None:
    """Set a file's permissions to those of a new file, found by creating an empty one."""
    probe = path.with_name(path.name + ".mode.partial")
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        path.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))
    finally:
        os.close(descriptor)
        probe.unlink()


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write `{name}.safetensors` for each entry and a manifest to `{folder}.partial`; read them back; rename the folder.

    A process killed at any moment leaves either the complete checkpoint or a `.partial` folder that nothing reads. Raises
    DiskFull, and leaves nothing behind, where there is no room.
    """
    for stale in folder.parent.glob("checkpoint-*.partial"):
        shutil.rmtree(stale)
    needed = sum(v.nbytes for content in tensors.values() for v in content.values()) + len(tensors) * 2**16
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        size = readable_size
        raise DiskFull(f"{folder} needs {size(needed)} and {size(free)} are free: {size(needed - free)} are missing")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir()
    hashes = {}
    try:
        for name, content in tensors.items():
            path = partial / f"{name}.safetensors"
            content = {k: v.detach().cpu().contiguous() for k, v in content.items()}
            save_tensors(content, path)
            _sync(path)
            _verify(path, content)
            hashes[path.name] = _sha256(path)
        manifest = partial / "manifest.json"
        manifest.write_text(json.dumps({"state": state, "files": hashes}, indent=1), encoding="utf-8")
        _sync(manifest)
    except (OSError, SafetensorError) as error:
        reason = no_space(error)
        if reason is None:
            raise
        written = sum(p.stat().st_size for p in partial.iterdir())
        shutil.rmtree(partial)
        missing = readable_size(max(needed - written, 0))
        raise DiskFull(f"{folder} needs {readable_size(needed)}: {reason}, {missing} are missing") from None
    _sync(partial)
    if folder.exists():
        remove_checkpoint(folder)
    partial.rename(folder)
    _sync(folder.parent)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; a process killed meanwhile leaves a folder that is not read as one."""
    going = folder.with_name(folder.name + ".old.partial")
    folder.rename(going)
    shutil.rmtree(going)


def set_aside(folder: Path, suffix: str) -> Path:
    """Rename a checkpoint so that no run resumes from it; -> its new path."""
    target = folder.with_name(f"{folder.name}.{suffix}")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    return target


def no_space(error: Exception) -> str | None:
    """Why `error` means that there is no room for a file, or None when it means something else."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
        if os.name == "nt" and number in (39, 112):  # its own numbers: ERROR_HANDLE_DISK_FULL, ERROR_DISK_FULL
            number = errno.ENOSPC
    return os.strerror(number).lower() if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and state of a checkpoint. Raises ValueError, naming the file, when it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise ValueError(f"{folder / 'manifest.json'} is truncated or changed") from None
    tensors = {}
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.exists() or _sha256(path) != digest:
            raise ValueError(f"{path} is {'truncated or changed' if path.exists() else 'missing'}")
        tensors[path.stem] = load_file(path)
    return tensors, manifest["state"]


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoint folders with a manifest, newest first."""
    return sorted((p.parent for p in run.glob("checkpoint-????????/manifest.json")), reverse=True)


def _verify(path: Path, content: Mapping[str, Tensor]) -> None:
    """Read a file back. Raises ValueError when it does not hold `content`, bit by bit."""
    with safe_open(path, "pt") as file:
        for name, tensor in content.items():
            read = file.get_tensor(name)
            if read.dtype != tensor.dtype or not torch.equal(_bits(read), _bits(tensor)):
                raise ValueError(f"{path} does not hold what was written to it ({name} differs): is the disk damaged?")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def _sync(path: Path) -> None:
    """Have a file or a folder's entries on the disk. Windows opens no folder, and flushes only what is open for writing."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- pipelines


def resolve(
    model: str | Path, revision: str | None = None, variant: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:
    """The folder of a model: the name of a shipped one ("emoji"), a folder, or a Hub id (fetched, safetensors only).

    `subfolder` is where in the folder or repository the model is. Of a Hub id with a `variant`, no other networks' weights
    are fetched. `hub` are options of its client: cache_dir, token, local_files_only, force_download. Raises ValueError, in one
    line, for a name that is none of these and for a Hub that cannot be reached.
    """
    name = str(model)
    if (PRETRAINED / name / "model_index.json").is_file() and "/" not in name:
        return PRETRAINED / name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / (subfolder or "")
    shipped = sorted(p.parent.name for p in PRETRAINED.glob("*/model_index.json"))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"unknown model {name!r}: not a shipped model ({', '.join(shipped) or 'none'}), a folder, or a Hub id")
    return fetch(name, revision, variant, subfolder, **hub)


def check_folder(folder: Path, lacking: Collection[str] = (), variant: str | None = None) -> dict[str, Any]:
    """A pipeline folder's `model_index.json`, after checking that each component's files exist and are complete.

    Components in `lacking` are not checked; `variant` is a suffix of the weights' files, as "fp16". Raises ValueError
    that names the file: missing, truncated, or pickled weights where safetensors are expected.
    """
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise ValueError(f"{folder} is not a model folder: model_index.json is missing")
    index = read_object(index_path)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None or name in lacking:
            continue
        library, class_name = entry
        entry[0] = class_module(library, class_name)
        part = folder / name
        if not part.is_dir():
            raise ValueError(f"{folder} lacks the folder {name}/ that its model_index.json names")
        _check_configuration(part)
        weights = sorted(part.glob("*.safetensors"))
        if holds_network(part):
            _check_variant(part, weights, variant)
        tensors = {n for path in weights for n in check_safetensors(path)}
        missing = [n for n in STATISTICS if name == "prior" and n not in tensors]
        if missing:
            raise ValueError(
                f"{weights[0]} lacks {missing[0]}, a statistic of CLIP's embeddings that the prior cannot do without"
            )
        missing = [n for n in _expected_tensors(part, entry[0], class_name) if n not in tensors]
        if missing:
            more = f" and {len(missing) - 1} other tensors" if missing[1:] else ""
            raise ValueError(f"{weights[0]} lacks {missing[0]}{more}")
    return index


def _check_configuration(part: Path) -> None:
    """Raises ValueError for a component without a configuration, with one that is not JSON, or without its vocabulary."""
    configs = [p for p in part.glob("*.json") if not p.name.endswith(".index.json")]
    if not configs:
        raise ValueError(f"{part} holds no configuration (.json)")
    for path in configs:
        if path.name.endswith("config.json"):
            read_object(path)
    if (part / "tokenizer_config.json").is_file() and not any(p for v in _VOCABULARIES for p in part.glob(v)):
        raise ValueError(f"{part} holds no vocabulary ({', '.join(_VOCABULARIES)})")


def _check_variant(part: Path, weights: Sequence[Path], variant: str | None) -> None:
    """Raises ValueError for a network without safetensors of the `variant`."""
    if not weights:
        pickles = sorted(p.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for p in part.glob(pattern))
        if pickles:
            raise ValueError(f"{part / pickles[0]} is a pickle and is refused; convert it to safetensors")
        raise ValueError(f"{part} holds no weights (.safetensors)")
    variants = {p.stem.split(".")[1].split("-")[0] if "." in p.stem else None for p in weights}
    if variant not in variants and None not in variants:
        asked = f"variant {variant!r}" if variant else "variant-less weights"
        raise ValueError(f"{part} holds no {asked}; it has: {', '.join(sorted(v for v in variants if v))}")
    if variant and variant not in variants:
        raise ValueError(f"{part} holds no weights of the variant {variant!r}")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, where it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also where it is not text
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object: {json.dumps(found)[:40]}")
    return found


def _expected_tensors(part: Path, library: str, class_name: str) -> list[str]:
    """The names of the tensors of this package's networks; [] for other libraries', which also load older names."""
    component = getattr(importlib.import_module(library), class_name, None) if library.split(".")[0] in OWN else None
    if not (isinstance(component, type) and issubclass(component, torch.nn.Module) and issubclass(component, ConfigMixin)):
        return []
    with torch.device("meta"):
        network = component.from_config(read_object(part / "config.json"))
    return sorted(network.state_dict()) if isinstance(network, torch.nn.Module) else []


def holds_network(part: Path) -> bool:
    """Whether a component's folder is a network's: schedulers, tokenizers and preprocessors have no weights."""
    return (part / "config.json").is_file() and not (part / "tokenizer_config.json").is_file()


def components_folder(run: str | Path) -> Path:
    """The folder of a training run's averaged weights: `final/`, or `latest/` until it ends; else the folder itself."""
    return next((Path(run) / name for name in ("final", "latest") if (Path(run) / name).is_dir()), Path(run))


def import_own_modules(index: Mapping[str, Any]) -> None:
    """Import this package's modules that a `model_index.json` names: diffusers only finds classes of imported modules."""
    for entry in index.values():
        if isinstance(entry, list) and str(entry[0]).split(".")[0] in OWN:
            importlib.import_module(entry[0])


def check_safetensors(path: Path) -> list[str]:
    """The names of a file's tensors. Raises ValueError when it is truncated or damaged; reads only its header."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({str(error).splitlines()[0]})") from None


@contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write into, renamed to `out` at the end; an exception leaves `out` as it was.

    Raises ValueError when `out` exists, without `force`.
    """
    if out.exists() and not force:
        raise ValueError(f"{out} exists; pass --force to replace it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def save_components(
    folder: Path, components: Mapping[str, Any], dtype: torch.dtype | None = None, pipeline: str = "UnCLIPPipeline"
) -> None:
    """Write components as sub-folders of a `pipeline`, with the `model_index.json` that names their classes.

    Floating-point weights are stored as `dtype` when one is given.
    """
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, component in components.items():
        module = type(component).__module__
        library = module.split(".")[0]
        index[name] = [library if library in ("diffusers", "transformers") else module, type(component).__name__]
        if isinstance(component, torch.nn.Module) and dtype is not None:
            component = torch.nn.Module.to(
                copy.deepcopy(component), dtype
            )  # diffusers' `to` warns about layers that do not exist
        component.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    ready_to_share(folder)


def ready_to_share(folder: Path) -> None:
    """Set the permissions of a pipeline's weights by the umask, and delete from its configurations the paths that components
    were loaded from.

    safetensors makes files that only the owner reads, and the paths are of one machine.
    """
    for path in folder.glob("*/*.safetensors"):
        make_readable(path)
    for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        known = [config.pop(name, None) for name in ("_name_or_path", "name_or_path")]
        if any(value is not None for value in known):
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_components(model: str | Path, names: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Some components of a pipeline folder, each by the class that its model_index.json names."""
    folder = resolve(model)
    index = check_folder(folder)
    missing = [n for n in names if index.get(n, [None])[0] is None]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}; its parts: {', '.join(k for k in index if not k.startswith('_'))}")
    return {name: load_component(folder / name, index[name][0], index[name][1], dtype) for name in names}


def load_component(
    folder: Path, library: str, class_name: str, dtype: torch.dtype | None = None, variant: str | None = None
) -> Any:
    """One component from its folder; networks come in evaluation mode, from safetensors only."""
    component = getattr(importlib.import_module(library), class_name)
    if not issubclass(component, torch.nn.Module):
        return component.from_pretrained(folder)
    asked = {k: v for k, v in (("dtype", dtype), ("variant", variant)) if v is not None}
    return component.from_pretrained(folder, use_safetensors=True, **asked).eval()
