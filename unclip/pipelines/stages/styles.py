"""Drawing styles, for checkpoints that are conditioned on them."""

# B images

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...diffusion.sampling import Generators
from ...runtime.config import nearest

if TYPE_CHECKING:
    from ..base import UnCLIPBase


def choose_styles(
    pipe: "UnCLIPBase", style: str | None, prompt: str | list[str] | None, count: int, generator: Generators
) -> Tensor | None:
    """The indices [B] of the images' styles; None for checkpoints without styles.

    `style` is for all images; without it, that named in each prompt ("a cat, flat style"), else one at random. Raises
    ValueError for a style that this checkpoint does not have.
    """
    known = pipe.styles
    if style is not None and style not in known:
        choices = f"{nearest(str(style), known)}; choose from {', '.join(known)}" if known else ": this model has no styles"
        raise ValueError(f"unknown style {style!r}{choices}")
    if not known:
        return None
    if isinstance(generator, list):
        chosen = torch.cat([torch.randint(len(known), (1,), generator=g, device=g.device).cpu() for g in generator])
    else:
        device = None if generator is None else generator.device
        chosen = torch.randint(len(known), (count,), generator=generator, device=device).cpu()
    if style is not None:
        chosen = torch.full_like(chosen, known.index(style))
    named = re.compile(rf"\b({'|'.join(map(re.escape, known))}) style\b", re.IGNORECASE)
    prompts = [prompt] if isinstance(prompt, str) else prompt or []
    for number, text in enumerate(prompts if style is None else ()):
        found = named.search(text)
        if found:
            each = count // len(prompts)
            chosen[number * each : (number + 1) * each] = known.index(found[1].lower())
    return chosen.to(pipe._execution_device)
