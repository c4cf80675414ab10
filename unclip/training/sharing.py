"""Sending what a run trained to the Hub."""

from collections.abc import Callable
from pathlib import Path

from ..pipelines.hub import push_folder


def push_final(folder: Path, repository: str, report: Callable[[str], None]) -> None:
    """Send `folder` to the Hub as `OWNER/NAME`. What goes wrong is reported in one line: the run is finished all the same."""
    try:
        report(f"sent: {push_folder(folder, repository)}")
    except ValueError as error:
        report(f"{error}; to try again: unclip push {folder} {repository}")
