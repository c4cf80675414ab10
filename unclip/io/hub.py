"""Models on the Hub: the files of a model's folder, and fetching them."""

from pathlib import Path
from typing import Any

# A model folder's own files, beside model_index.json and the components.
CARD = "README.md"  # the model card
DISTILLED_FILE = "decoder_distilled.safetensors"  # the decoder in few steps, an adapter
AXES_FILE = "image_components.safetensors"  # the principal axes of the embeddings that the stages were trained on


def fetch(name: str, revision: str | None, variant: str | None, subfolder: str | None, **hub: Any) -> Path:
    """The folder in the cache of a model on the Hub: its configurations, safetensors (of `variant` alone) and card.

    `hub` are options of the Hub's client. Raises ValueError, in one line, where it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    below = f"{subfolder.strip('/')}/" if subfolder else ""
    weights = ["*.safetensors"]
    if variant:
        weights = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors", DISTILLED_FILE, AXES_FILE]
    allowed = [below + pattern for pattern in ("*.json", *weights, "*.txt", "*.model", CARD)]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=allowed, **hub), below)
    except LocalEntryNotFoundError as error:
        raise ValueError(f"model {name!r} is no folder and not in the Hub's cache, and the Hub cannot be reached") from error
    except Exception as error:  # the Hub client raises a dozen kinds: not found, gated, time-out
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {name!r} is neither a folder nor could it be fetched from the Hub: {reason}") from error
