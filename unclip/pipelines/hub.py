"""Sending a model's folder to the Hub: complete, without local paths, in one commit."""

import json
import re
from pathlib import Path

from ..io.checkpoints import check_folder
from ..io.hub import CARD
from .model_card import IMAGES, CardFacts, model_card

PUSH_OPTIONS = ("repo_id", "private", "token", "commit_message", "revision", "subfolder", "create_pr")  # of `push_folder`
SENT = ("model_index.json", CARD, "*.safetensors", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", f"{IMAGES}/*.png")


def push_folder(  # noqa: PLR0913 - the options of the Hub's client
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    facts: CardFacts | None = None,
) -> str:
    """Send a model's folder to the Hub as `OWNER/NAME` in one commit, creating the repository if needed; -> its address.

    A model card is made of `facts` where the folder has none. The weights are sent first and the commit last: an upload that
    is interrupted leaves the repository as it was, and the next one sends only what the Hub lacks. `revision` is a branch.

    Raises:
        ValueError: in one line, for a folder that lacks a file or holds a path of this machine, for `facts` of a folder that
            has a card, and for what the Hub refuses.
    """
    check_folder(folder, variant=_only_variant(folder))
    check_no_paths(folder)
    files: dict[str, Path | bytes] = {
        p.relative_to(folder).as_posix(): p for pattern in SENT for p in sorted(folder.glob(pattern))
    }
    if CARD not in files:
        files |= model_card(folder, repo_id, facts or CardFacts())
    elif facts is not None and facts != CardFacts():
        raise ValueError(f"{folder / CARD} is there: remove it to have a card made of a licence, data, prompts or a report")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        below = f"{subfolder}/" if subfolder else ""
        operations = [CommitOperationAdd(below + name, content) for name, content in files.items()]
        message = commit_message or "Upload the model with unclip"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    except Exception as error:  # the Hub's client raises a dozen kinds, and those of its HTTP library
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{folder} could not be sent to {repo_id}: {reason}") from error
    return str(commit.pr_url or commit.commit_url)


def _only_variant(folder: Path) -> str | None:
    """The variant of a folder whose weights are all of one, as "fp16"."""
    variants = {path.stem.split(".")[1].split("-")[0] if "." in path.stem else "" for path in folder.glob("*/*.safetensors")}
    return variants.pop() or None if len(variants) == 1 else None


def check_no_paths(folder: Path) -> None:
    """Raise ValueError, naming file and value, where a configuration holds an absolute path."""
    for file in [folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]:
        for value in _strings(json.loads(file.read_text(encoding="utf-8"))):
            if re.match(r"(/|~/|[A-Za-z]:[\\/])[^/\\]+[/\\]", value):
                raise ValueError(f"{file} holds the path {value!r} of this machine: remove it before sharing the model")


def _strings(value: object) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for entry in value for text in _strings(entry)]
    return [value] if isinstance(value, str) else []
