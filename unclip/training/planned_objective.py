"""An objective without data, weights and storage: what `unclip plan` counts.

It is built under torch's fake tensors by the stage's own constructor, of which only the `load_...` methods are replaced.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.data import Dataset

from .. import networks
from ..data.examples import EmojiScenes
from ..data.scenes import IconSet
from ..io.checkpoints import check_folder, components_folder, resolve
from ..runtime.config import ConfigError, construct, load_config, shipped
from .objectives import Objective, objective_class
from .objectives.frozen_clip import CachedCLIP, FrozenCLIP
from .objectives.icon_bank import IconBank

SIDE = 64  # pixels of an image of the dataset, where `data.size` does not say
STOCK_TOKENS = 77  # of a CLIP that is not here: those of OpenAI's
UNKNOWN = ""  # fingerprint: there are no weights to take it of
OTHER_MODELS = ("clip", "adapter")  # keys of `objective` that name other models


class PlannedImages(EmojiScenes):
    """Stands in for a dataset of images of `size` px, scenes or one's own; it has no items."""

    def __init__(self, size: int):
        self.size, self.icons = size, cast(IconSet, ())


class PlannedCLIP(FrozenCLIP):
    """A frozen CLIP of these towers, without a tokenizer."""

    def __init__(self, text: nn.Module, image: nn.Module):
        nn.Module.__init__(self)
        self.towers = nn.ModuleDict({"text": text, "image": image}).requires_grad_(False).eval()
        self.dim, self.fingerprint = networks.embedding_dim(text), UNKNOWN
        tokens = torch.zeros(1, networks.context_length(text), dtype=torch.long)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.ones(1, 3, 1, 1), persistent=False)
        self.register_buffer("empty_tokens", tokens, persistent=False)
        self.register_buffer("empty_mask", tokens == 0, persistent=False)


class PlannedCache(CachedCLIP):
    """A cache of embeddings [`dim`] and encodings [`tokens`, `width`]."""

    def __init__(self, dim: int, tokens: int, width: int):
        nn.Module.__init__(self)
        self.dim, self.fingerprint = dim, UNKNOWN
        self.register_buffer("embeds", torch.zeros(1, dim), persistent=False)
        self.register_buffer("encodings", torch.zeros(1, tokens, width), persistent=False)
        self.register_buffer("mask", torch.ones(1, tokens, dtype=torch.bool), persistent=False)


class PlannedInputs:
    """Replaces what an objective's constructor reads. Mixed in before the class of the stage."""

    planned_clip: ClassVar[PlannedCLIP | PlannedCache | None] = None
    vocabulary_of_data: bool

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> Dataset[Any]:
        if self.vocabulary_of_data:
            with unset_fake_temporarily():
                return super().load_examples(data, split, seed)  # type: ignore[misc]  # of the objective that follows in the MRO
        return PlannedImages(data.get("size", SIDE))

    def load_clip(self, clip: str, embeddings: str | None) -> PlannedCLIP | PlannedCache | None:
        return self.planned_clip

    def load_icon_bank(self, data: dict[str, Any], prior: str | None, samples: int) -> IconBank:
        return IconBank(cast(IconSet, ()), Path(), nn.Identity(), None, samples, 0)  # without a prior it reads nothing

    def load_tokenizer(self, text: nn.Module, weights: bool) -> None:
        return None


def is_clip_conditioned(stage: str) -> bool:
    """Whether a stage is trained against a frozen CLIP."""
    return "clip" in inspect.signature(objective_class(stage)).parameters


def plan_clip(stage: str, sections: dict[str, Any], config_path: str | Path) -> PlannedCLIP | PlannedCache:
    """The CLIP of a stage, or its cache if the data section names one or the CLIP is not here. Call it under fake tensors."""
    towers = _towers(sections, config_path)
    if towers is not None and not sections["data"].get("embeddings"):
        return PlannedCLIP(*towers)
    dim = None if towers is None else networks.embedding_dim(towers[0])
    tokens = STOCK_TOKENS if towers is None else networks.context_length(towers[0])
    if stage == "prior":
        network: Any = networks.prior(sections["model"], dim)
        width = network.encoder_hidden_states_proj.in_features
        return PlannedCache(network.config.embedding_dim, network.config.num_embeddings, width)
    if stage == "prior_autoregressive":
        dim = cast(Any, networks.prior_autoregressive(sections["model"], dim)).config.embedding_dim
    else:
        dim = cast(Any, networks.decoder(sections["model"], dim)["text_proj"]).config.clip_embeddings_dim
    return PlannedCache(cast(int, dim), tokens, cast(int, dim))


def plan_objective(stage: str, sections: dict[str, Any], clip: PlannedCLIP | PlannedCache | None) -> Objective:
    """The objective of a stage with its adapter on. Call it under fake tensors.

    Raises ConfigError for a configuration that could not be trained.
    """
    made = _planned(objective_class(stage), clip)
    settings = {k: v for k, v in sections["objective"].items() if k not in OTHER_MODELS}
    given = {"clip": sections["objective"].get("clip")} if clip is not None else {}
    objective = construct(made, settings, "objective", model=sections["model"], data=sections["data"], seed=0, **given)
    _add_adapter(objective)
    return objective.train()


def _planned(stage: type[Objective], clip: PlannedCLIP | PlannedCache | None) -> type[Objective]:
    """A stage's class that reads nothing, and that of the decoder's objective inside it, if there is one."""
    replaced: dict[str, Any] = {"planned_clip": clip, "__module__": stage.__module__}
    if hasattr(stage, "decoder_objective"):
        replaced["decoder_objective"] = _planned(stage.decoder_objective, clip)
    return type(f"Planned{stage.__name__}", (PlannedInputs, stage), replaced)


def _add_adapter(objective: Objective) -> None:
    """Put the adapter on: PEFT moves new layers to the networks' device, which fake tensors refuse, unless they are on meta."""
    with unset_fake_temporarily(), torch.device("meta"):
        objective.add_adapter()
    for module in objective.trained.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                setattr(module, name, nn.Parameter(fake, parameter.requires_grad))


def _towers(sections: dict[str, Any], config_path: str | Path) -> tuple[nn.Module, nn.Module] | None:
    """A CLIP's towers: from its folder, or from the configuration beside this one that makes it; None of a Hub id."""
    name = sections["objective"].get("clip")
    if not name:
        raise ConfigError("missing key objective.clip")
    for path in sorted(shipped(config_path).parent.glob("*.yaml")):
        config = load_config(path)
        if config.get("stage") == "clip" and config.get("output_dir") == str(name):
            model = config.get("model") or {}
            return networks.text_tower(model.get("text")), networks.image_tower(model.get("image"))
    if "/" in str(name) and not Path(str(name)).is_dir():
        return None
    folder = resolve(components_folder(name))
    index = check_folder(folder)
    text, image = (_empty(folder / part, *index[part]) for part in ("text_encoder", "image_encoder"))
    return text, image


def _empty(folder: Path, library: str, class_name: str) -> nn.Module:
    """A component of the shape that its folder states, without its weights."""
    component = getattr(importlib.import_module(library), class_name)
    if hasattr(component, "config_class") and component.config_class is not None:
        return component(component.config_class.from_pretrained(folder))
    return component.from_config(component.load_config(folder))
