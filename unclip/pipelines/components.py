"""Checks that the components of a pipeline fit each other."""

from typing import Any

from torch import nn

from ..diffusion.scheduler import replace_stock_unclip


def check_components(components: dict[str, Any]) -> dict[str, Any]:
    """The components, with schedulers of this package for deprecated ones of diffusers.

    Raises ValueError for a network without the scheduler that it needs, and for components of different CLIPs.
    """
    components = {n: replace_stock_unclip(c) if n.endswith("scheduler") and c is not None else c for n, c in components.items()}
    check_fit(components)
    prior = components.get("prior")
    if prior is not None and not is_autoregressive(prior) and components.get("prior_scheduler") is None:
        raise ValueError(f"a {type(prior).__name__} is a diffusion prior and needs a prior_scheduler")
    if components.get("upsampler_1024") is not None and components.get("upsampler_1024_scheduler") is None:
        raise ValueError("an upsampler_1024 needs an upsampler_1024_scheduler")
    return components


def is_autoregressive(prior: nn.Module) -> bool:
    """Whether a prior samples tokens autoregressively, without diffusion and scheduler."""
    return hasattr(prior, "draw")


def check_fit(components: dict[str, Any]) -> None:
    """Raises ValueError, with both names and values, for components that were made for different CLIPs."""
    widths: dict[str, int] = {}
    prints: dict[str, str] = {}
    for name, fields in (
        ("text_encoder", ("embedding_dim", "projection_dim")),
        ("image_encoder", ("embedding_dim", "projection_dim")),
        ("prior", ("embedding_dim",)),
        ("text_proj", ("clip_embeddings_dim",)),
    ):
        config = getattr(components.get(name), "config", None)
        if config is None:
            continue
        width = next((getattr(config, f) for f in fields if getattr(config, f, None) is not None), None)
        if width is not None:
            widths[name] = width
        if getattr(config, "clip_fingerprint", None):
            prints[name] = config.clip_fingerprint
    for what, found in (("CLIP embeddings of {} dimensions", list(widths.items())), ("the CLIP {}", list(prints.items()))):
        for name, other in found[1:]:
            first, value = found[0]
            if other != value:
                raise ValueError(
                    f"{first} and {name} do not belong together: {first} is made for {what.format(value)}, "
                    f"{name} for {what.format(other)}"
                )
