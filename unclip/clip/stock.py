"""The towers of transformers' CLIP models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging

from ..io.checkpoints import resolve


def clip_text(clip: str | Path) -> dict[str, Any]:
    """Text tower and tokenizer of a transformers CLIP; padded with "!", token 0, as in the training of the originals."""
    folder = resolve(clip)
    with _without_load_report():
        text = CLIPTextModelWithProjection.from_pretrained(folder, use_safetensors=True)
    return {"text_encoder": text.eval(), "tokenizer": CLIPTokenizer.from_pretrained(folder, pad_token="!")}


def clip_image(clip: str | Path) -> dict[str, Any]:
    """Image tower and preprocessor of a transformers CLIP, for image variations; {} where it has none."""
    folder = resolve(clip)
    if not (folder / "preprocessor_config.json").is_file() or AutoConfig.from_pretrained(folder).model_type != "clip":
        return {}
    with _without_load_report():
        image = CLIPVisionModelWithProjection.from_pretrained(folder, use_safetensors=True)
    return {"image_encoder": image.eval(), "feature_extractor": CLIPImageProcessorPil.from_pretrained(folder)}


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers lists every tensor of the other tower as unexpected, although the folder holds both."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
