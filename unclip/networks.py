"""The networks that a configuration's `model` section describes: this package's own, or the stock one that `class` names."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from decoder import Decoder, UnCLIPTextProjModel
from prior import AutoregressivePrior, DiffusionPrior
from upsamplers import Upsampler

from .clip.towers import ImageTower, TextTower
from .io.moved import attribute
from .runtime import attention
from .runtime.config import ConfigError, construct, nearest

Section = Mapping[str, Any] | None


def prior(model: Section, dim: int | None = None, fingerprint: str | None = None) -> nn.Module:
    """A diffusion prior, `DiffusionPrior` or diffusers' `PriorTransformer`, for CLIP embeddings of width `dim`, if known."""
    network = _of_width(_diffusers(DiffusionPrior, model, "PriorTransformer"), dim)
    if isinstance(network, DiffusionPrior):
        network.register_to_config(clip_fingerprint=fingerprint)
    else:  # statistics, though parameters there; and its configuration has no place for a fingerprint
        network.clip_mean.requires_grad_(False)
        network.clip_std.requires_grad_(False)
    return attention.install(network)


def prior_autoregressive(model: Section, dim: int | None = None, fingerprint: str | None = None) -> AutoregressivePrior:
    network = _of_width(construct(AutoregressivePrior, model, "model", clip_fingerprint=fingerprint), dim)
    return attention.install(network)


def _of_width(prior: nn.Module, dim: int | None) -> nn.Module:
    """Raises ConfigError for a prior of embeddings of another width than `dim`."""
    stated = prior.config.embedding_dim
    if dim is not None and stated != dim:
        raise ConfigError(f"model.embedding_dim is {stated}, but the CLIP's embeddings have {dim} dimensions")
    return prior


def decoder(model: Section, dim: int | None = None, fingerprint: str | None = None) -> nn.ModuleDict:
    """`decoder`, a `Decoder` or diffusers' `UNet2DConditionModel`, and the `text_proj` that tells it of CLIP.

    `dim` is the width of CLIP's embeddings; the subsection `text_proj` may state it, and fills what is left of
    `UnCLIPTextProjModel`. Raises ConfigError where the two differ.
    """
    model = dict(model or {})
    told = dict(model.pop("text_proj", None) or {})
    stated = told.pop("clip_embeddings_dim", dim)
    if stated is None:
        raise ConfigError("missing key model.text_proj.clip_embeddings_dim")
    if dim is not None and stated != dim:
        raise ConfigError(f"model.text_proj.clip_embeddings_dim is {stated}, but the CLIP's embeddings have {dim} dimensions")
    network = _diffusers(Decoder, model, "UNet2DConditionModel")
    stock = isinstance(network, diffusers.UNet2DConditionModel)  # its CLIPs' embeddings are longer than 1
    told = {"embedding_scale": 1.0 if stock else stated**0.5} | told
    project = construct(
        UnCLIPTextProjModel,
        told,
        "model.text_proj",
        clip_embeddings_dim=stated,
        time_embed_dim=time_embed_dim(network),
        cross_attention_dim=network.config.cross_attention_dim,
        clip_fingerprint=fingerprint,
    )
    return nn.ModuleDict({"decoder": attention.install(network), "text_proj": attention.install(project)})


def upsampler(model: Section) -> nn.Module:
    """An `Upsampler` or diffusers' `UNet2DModel`."""
    network = _diffusers(Upsampler, model, "UNet2DModel")
    if isinstance(network, diffusers.UNet2DModel) and (network.config.in_channels, network.config.out_channels) != (6, 3):
        raise ConfigError(
            f"model: an upsampler takes 6 channels and answers with 3, got {network.config.in_channels} and "
            f"{network.config.out_channels}"
        )
    return network


def is_noise_conditioned(upsampler: nn.Module) -> bool:
    """Whether an upsampler, of either kind, takes the noise level of its low-resolution image as `class_labels`."""
    return upsampler.config.get("class_embed_type") == "timestep"


def towers(model: Section) -> tuple[dict[str, Any], dict[str, Any]]:
    """The subsections `text` and `image` of a CLIP's or a judge's `model`. Raises ConfigError for any other key."""
    for key in model or {}:
        if key not in ("text", "image"):
            raise ConfigError(f"unknown key model.{key}{nearest(key, ('text', 'image'))}; valid keys: model.text, model.image")
    return tuple(dict((model or {}).get(key) or {}) for key in ("text", "image"))


def text_tower(model: Section) -> nn.Module:
    """A `TextTower` or transformers' `CLIPTextModelWithProjection`."""
    return _transformers(TextTower, model, "model.text", "CLIPTextModelWithProjection", "CLIPTextConfig")


def image_tower(model: Section) -> nn.Module:
    """An `ImageTower` or transformers' `CLIPVisionModelWithProjection`."""
    return _transformers(ImageTower, model, "model.image", "CLIPVisionModelWithProjection", "CLIPVisionConfig")


def time_embed_dim(network: nn.Module) -> int:
    """The width of a decoder's time embedding, to which CLIP's is added."""
    stated = network.config.get("time_embed_dim")
    return stated or network.time_embedding.linear_2.out_features


def embedding_dim(tower: nn.Module) -> int:
    """The width of a CLIP tower's embeddings."""
    return getattr(tower.config, "embedding_dim", None) or tower.config.projection_dim


def context_length(tower: nn.Module) -> int:
    """The most tokens that a CLIP text tower takes."""
    return getattr(tower.config, "context_length", None) or tower.config.max_position_embeddings


def freeze_below(tower: nn.Module, layers: int | None) -> None:
    """Leave only the top `layers` layers of a text tower's Transformer to be trained; None leaves everything."""
    if layers is None:
        return
    body = tower.bert if isinstance(tower, TextTower) else tower.text_model
    body.requires_grad_(False)
    found = list(body.encoder.layer if isinstance(tower, TextTower) else body.encoder.layers)
    for layer in found[len(found) - layers :]:
        layer.requires_grad_(True)


def recompute_activations(network: nn.Module) -> bool:
    """Have a network compute its blocks' activations again on the way back instead of keeping them; -> whether it can.

    This package's and diffusers' networks switch that by themselves, transformers' towers too, also inside another network;
    diffusers' `PriorTransformer` cannot, and its blocks are wrapped here.
    """
    if getattr(network, "_supports_gradient_checkpointing", False):
        network.enable_gradient_checkpointing()
        return True
    if isinstance(network, diffusers.PriorTransformer):
        for block in network.transformer_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return True
    towers = [m for m in network.modules() if isinstance(m, transformers.PreTrainedModel) and m.supports_gradient_checkpointing]
    for tower in towers[:1]:  # those inside it follow
        tower.activation_checkpointing_enable({"use_reentrant": False})
    return bool(towers)


def _diffusers(own: type, model: Section, stock: str) -> nn.Module:
    return construct(*_named(own, model, "model", stock, getattr(diffusers, stock)), "model")


def _transformers(own: type, model: Section, where: str, stock: str, config: str) -> nn.Module:
    chosen, rest = _named(own, model, where, stock, getattr(transformers, config))
    made = construct(chosen, rest, where)
    return made if chosen is own else getattr(transformers, stock)(made)


def _named(own: type, model: Section, where: str, stock: str, factory: type) -> tuple[type, dict[str, Any]]:
    """`own`, or `factory` where the section's `class` is `stock`; and the rest of the section."""
    rest = dict(model or {})
    name = rest.pop("class", own.__name__)
    known = {own.__name__: own, stock: factory}
    if name not in known:
        raise ConfigError(f"{where}.class is {name!r}{nearest(name, known)}; choose from {', '.join(known)}")
    return known[name], rest


def __getattr__(name: str) -> Any:
    return attribute(__name__, name, [__name__])  # names of version 0.1
