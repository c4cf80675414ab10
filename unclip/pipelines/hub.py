"""Sending a model's folder to the Hub: complete, without local paths, in one commit."""

import json
import re
from pathlib import Path

from ..io.checkpoints import check_folder

PUSH_OPTIONS = ("repo_id", "private", "token", "commit_message", "revision", "create_pr")  # of `push_folder`
SENT = ("model_index.json", "README.md", "*.safetensors", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "images/*.png")


def push_folder(  # noqa: PLR0913 - keywords of diffusers' push_to_hub
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Send a model's folder to the Hub as `OWNER/NAME` in one commit, and create the repository if needed; -> its address.

    The weights are sent first and the commit last: an upload that is interrupted leaves the repository as it was, and the
    next one sends only what the Hub lacks.

    Raises:
        ValueError: in one line, for a folder that lacks a file or holds a path of this machine, and for what the Hub refuses.
    """
    check_folder(folder)
    check_no_paths(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(SENT),
            revision=revision,
            commit_message=commit_message or "Upload the model with unclip",
            create_pr=create_pr,
        )
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder} could not be sent to {repo_id}: {reason}") from error
    return str(commit.pr_url or commit.commit_url)


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
