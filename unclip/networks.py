"""The networks of a configuration's `model` section: this package's, or those of other libraries that `class` names."""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar, cast

import diffusers
import transformers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from decoder import Decoder, UnCLIPTextProjModel
from prior import AutoregressivePrior, DiffusionPrior
from upsamplers import Upsampler

from .clip.towers import ImageTower, TextTower, Tower
from .io.moved import attribute
from .runtime import attention
from .runtime.config import ConfigError, construct, nearest

Section = Mapping[str, Any] | None
PriorT = TypeVar("PriorT", bound=ModelMixin)


def prior(model: Section, dim: int | None = None, fingerprint: str | None = None) -> ModelMixin:
    """A diffusion prior, `DiffusionPrior` or diffusers' `PriorTransformer`, for CLIP embeddings of width `dim`, if known."""
    network = _of_width(_diffusers(DiffusionPrior, model, "PriorTransformer"), dim)
    if isinstance(network, DiffusionPrior):
        network.register_to_config(clip_fingerprint=fingerprint)
    elif isinstance(network, PriorTransformer):  # its statistics are parameters, and it has no place for a fingerprint
        network.clip_mean.requires_grad_(False)
        network.clip_std.requires_grad_(False)
    return attention.install(network)


def prior_autoregressive(model: Section, dim: int | None = None, fingerprint: str | None = None) -> AutoregressivePrior:
    network: AutoregressivePrior = construct(AutoregressivePrior, model, "model", clip_fingerprint=fingerprint)
    return attention.install(_of_width(network, dim))


def _of_width(prior: PriorT, dim: int | None) -> PriorT:
    """Raises ConfigError for a prior of embeddings of another width than `dim`."""
    stated = prior.config["embedding_dim"]
    if dim is not None and stated != dim:
        raise ConfigError(f"model.embedding_dim is {stated}, but the CLIP's embeddings have {dim} dimensions")
    return prior


def decoder(model: Section, dim: int | None = None, fingerprint: str | None = None) -> nn.ModuleDict:
    """`decoder`, a `Decoder` or diffusers' `UNet2DConditionModel`, and `text_proj`, its CLIP conditioning.

    `dim` is the width of CLIP's embeddings; the subsection `text_proj` may state it, and has the other arguments of
    `UnCLIPTextProjModel`. Raises ConfigError where the two differ.
    """
    model = dict(model or {})
    projection = dict(model.pop("text_proj", None) or {})
    stated = projection.pop("clip_embeddings_dim", dim)
    if stated is None:
        raise ConfigError("missing key model.text_proj.clip_embeddings_dim")
    if dim is not None and stated != dim:
        raise ConfigError(f"model.text_proj.clip_embeddings_dim is {stated}, but the CLIP's embeddings have {dim} dimensions")
    network = _diffusers(Decoder, model, "UNet2DConditionModel")
    is_stock = isinstance(network, UNet2DConditionModel)  # the embeddings of its CLIPs are not normalised
    projection = {"embedding_scale": 1.0 if is_stock else stated**0.5} | projection
    project: UnCLIPTextProjModel = construct(
        UnCLIPTextProjModel,
        projection,
        "model.text_proj",
        clip_embeddings_dim=stated,
        time_embed_dim=time_embed_dim(network),
        cross_attention_dim=network.config["cross_attention_dim"],
        clip_fingerprint=fingerprint,
    )
    return nn.ModuleDict({"decoder": attention.install(network), "text_proj": attention.install(project)})


def upsampler(model: Section) -> ModelMixin:
    """An `Upsampler` or diffusers' `UNet2DModel`."""
    network = _diffusers(Upsampler, model, "UNet2DModel")
    channels = network.config["in_channels"], network.config["out_channels"]
    if isinstance(network, UNet2DModel) and channels != (6, 3):
        raise ConfigError(f"model: an upsampler takes 6 channels and answers with 3, got {channels[0]} and {channels[1]}")
    return network


def is_noise_conditioned(upsampler: nn.Module) -> bool:
    """Whether an upsampler, of either kind, takes the noise level of its low-resolution image as `class_labels`."""
    config: Any = upsampler.config
    return config.get("class_embed_type") == "timestep"


def towers(model: Section) -> tuple[dict[str, Any], dict[str, Any]]:
    """The subsections `text` and `image` of a CLIP's or a judge's `model`. Raises ConfigError for any other key."""
    for key in model or {}:
        if key not in ("text", "image"):
            raise ConfigError(f"unknown key model.{key}{nearest(key, ('text', 'image'))}; valid keys: model.text, model.image")
    text, image = (dict((model or {}).get(key) or {}) for key in ("text", "image"))
    return text, image


def text_tower(model: Section) -> Tower:
    """A `TextTower` or transformers' `CLIPTextModelWithProjection`."""
    return _transformers(TextTower, model, "model.text", "CLIPTextModelWithProjection", "CLIPTextConfig")


def image_tower(model: Section) -> Tower:
    """An `ImageTower` or transformers' `CLIPVisionModelWithProjection`."""
    return _transformers(ImageTower, model, "model.image", "CLIPVisionModelWithProjection", "CLIPVisionConfig")


def time_embed_dim(network: nn.Module) -> int:
    """The width of a decoder's time embedding, to which CLIP's is added."""
    stated: int | None = cast(Any, network.config).get("time_embed_dim")
    return stated or cast(Any, network.time_embedding).linear_2.out_features


def embedding_dim(tower: nn.Module) -> int:
    """The width of a CLIP tower's embeddings."""
    config: Any = tower.config
    return getattr(config, "embedding_dim", None) or config.projection_dim


def context_length(tower: nn.Module) -> int:
    """The largest number of tokens of a CLIP text tower."""
    config: Any = tower.config
    return getattr(config, "context_length", None) or config.max_position_embeddings


def freeze_below(tower: nn.Module, layers: int | None) -> None:
    """Freeze a text tower's Transformer below its top `layers` layers; None freezes nothing."""
    if layers is None:
        return
    body: Any = tower.bert if isinstance(tower, TextTower) else tower.text_model
    body.requires_grad_(False)
    found = list(body.encoder.layer if isinstance(tower, TextTower) else body.encoder.layers)
    for layer in found[len(found) - layers :]:
        layer.requires_grad_(True)


def recompute_activations(network: nn.Module) -> bool:
    """Turn gradient checkpointing on for a network's blocks; -> whether it supports it.

    This package's and diffusers' networks have a method for it, transformers' towers too, also inside another network;
    diffusers' `PriorTransformer` has none, and its blocks are wrapped here.
    """
    if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
        network.enable_gradient_checkpointing()
        return True
    if isinstance(network, PriorTransformer):
        for block in network.transformer_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return True
    towers = [m for m in network.modules() if isinstance(m, transformers.PreTrainedModel) and m.supports_gradient_checkpointing]
    for tower in towers[:1]:  # also for towers inside it
        tower.activation_checkpointing_enable({"use_reentrant": False})
    return bool(towers)


def _diffusers(default: type, model: Section, stock: str) -> ModelMixin:
    """A `default`, or diffusers' class `stock` where the section's `class` names it."""
    return construct(*_select(default, model, "model", stock, getattr(diffusers, stock)), "model")


def _transformers(default: type, model: Section, where: str, stock: str, config: str) -> Tower:
    """A `default`, or transformers' class `stock`, made from its class `config`, where the section's `class` names it."""
    selected, rest = _select(default, model, where, stock, getattr(transformers, config))
    made = construct(selected, rest, where)
    return made if selected is default else getattr(transformers, stock)(made)


def _select(default: type, model: Section, where: str, stock: str, factory: type) -> tuple[type, dict[str, Any]]:
    """`default`, or `factory` where the section's `class` is `stock`; and the rest of the section."""
    rest = dict(model or {})
    name = rest.pop("class", default.__name__)
    known = {default.__name__: default, stock: factory}
    if name not in known:
        raise ConfigError(f"{where}.class is {name!r}{nearest(name, known)}; choose from {', '.join(known)}")
    return known[name], rest


def __getattr__(name: str) -> Any:
    return attribute(__name__, name, [__name__])  # names of version 0.1
