"""`unclip push`: a model's folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer


def push(  # noqa: PLR0913 - the parameters of a command are its options
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help='A model\'s folder, a training run, or "emoji".')],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The model's name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, created if needed; default: main.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the repository; default: at its top.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Sample it for the model card; may be given several times.")] = None,
    report: Annotated[Path | None, typer.Option(help="A folder of unclip evaluate, for the model card.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="For the model card, as apache-2.0.")] = None,
    data: Annotated[str | None, typer.Option(help="What it was trained on, for the model card.")] = None,
) -> None:
    """Send a model to the Hugging Face Hub, complete or not at all, and print its address.

    Uses the token of `hf auth login` or HF_TOKEN. A folder without README.md gets a model card.
    """
    from ..io.checkpoints import components_folder, resolve
    from ..pipelines.hub import push_folder
    from ..pipelines.model_card import CardFacts

    if not (Path(folder).expanduser().is_dir() or folder.count("/") == 0):
        raise ValueError(f"{folder} is no folder")
    path = components_folder(resolve(folder))
    facts = CardFacts(licence, data, _samples(path, prompt or []), report)
    address = push_folder(
        path,
        repository,
        private=private or None,
        revision=revision,
        subfolder=subfolder,
        commit_message=message,
        facts=facts,
    )
    print(address)


def _samples(folder: Path, prompts: list[str]) -> dict:
    """Prompt -> an image of it from seed 0."""
    if not prompts:
        return {}
    import torch

    from .images import load

    pipe = load(str(folder), None, "auto")
    return {prompt: pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0] for prompt in prompts}
