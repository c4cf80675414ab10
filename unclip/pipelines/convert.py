"""Original checkpoints of Karlo and Kandinsky 2 (PyTorch pickles) as folders of safetensors in this package's layout.

The pickles are read with `weights_only=True`: nothing in them is executed. Configurations are derived from the tensors'
shapes, apart from the width of an attention head, which is 64 in all of them.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from decoder import UnCLIPTextProjModel

from ..clip.stock import clip_image, clip_text
from ..diffusion.scheduler import UnCLIPScheduler
from ..io.checkpoints import new_folder, save_components
from .text_to_image import UnCLIPPipeline

HEAD_DIM = 64
CLIP_MODEL = "openai/clip-vit-large-patch14"
State = dict[str, Tensor]
# (name here, name in the original, how its tensors are stored there)
Names = Iterator[tuple[str, str, str]]
ModelT = TypeVar("ModelT", bound=ModelMixin)


@dataclass
class Level:
    """A resolution level of a UNet."""

    width: int
    attention: bool


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_EMB = "input_blocks.1.0.emb_layers.1.weight"
_PRIOR = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
}
_PRIOR_LAYER = {
    "attn1.to_out.0": "attn.c_proj",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
    "norm1": "ln_1",
    "norm3": "ln_2",
}
_TEXT_PROJ = {
    "encoder_hidden_states_proj": "text_seq_proj.0",
    "text_encoder_hidden_states_norm": "text_seq_proj.1",
    "clip_extra_context_tokens_proj": "clip_tok_proj",
    "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
}


# ---------------------------------------------------------------------------------------------- reading


def read_pickle(path: str | Path) -> Any:
    """The content of a `.ckpt`, `.th` or `.pt` file of tensors.

    Raises ValueError, naming the file, for one that is missing, no checkpoint, or contains code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds for truncated, damaged and foreign files
        wanted = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.\w+)", str(error))
        if wanted:
            raise ValueError(f"{path} is refused: it holds more than tensors ({wanted[1]})") from None
        found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # the text before it recommends to load it unsafely
        why = found[1] if found else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no PyTorch checkpoint: {why}") from None


def read_states(path: str | Path, *prefixes: str) -> list[State]:
    """For each prefix the tensors below `prefix.` of an original checkpoint, without it.

    Raises ValueError where there are none.
    """
    content = read_pickle(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    states = []
    for prefix in prefixes:
        named = {k[len(prefix) + 1 :]: v for k, v in content.items() if k.startswith(f"{prefix}.") and isinstance(v, Tensor)}
        if not named:
            raise ValueError(f"{path} holds no tensors named {prefix}.*; is it the checkpoint of another stage?")
        states.append(named)
    return states


def read_stats(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, D] of CLIP's image embeddings."""
    stats = read_pickle(path)
    if not isinstance(stats, list | tuple) or len(stats) != 2 or not all(isinstance(s, Tensor) for s in stats):
        raise ValueError(f"{path} must hold a mean and a standard deviation, got {type(stats).__name__}")
    return stats[0][None].float(), stats[1][None].float()


# ---------------------------------------------------------------------------------------------- names


def convert(model: ModelT, state: State, names: Names, path: str | Path, extra: State | None = None) -> ModelT:
    """`model` with the tensors of an original checkpoint. Raises ValueError, naming it, for a tensor that is missing."""
    converted = dict(extra or {})
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    for new, old, storage in names:
        for suffix in (".weight", ".bias", ""):
            parts = [n + suffix for n in new.split("|")]
            if old + suffix not in state or not any(p in wanted for p in parts):
                continue
            tensor = state[old + suffix].float()
            if storage == "conv1d" and suffix == ".weight":
                tensor = tensor[..., 0]
            pieces = split_heads(tensor, len(parts)) if len(parts) > 1 else [tensor]
            converted |= dict(zip(parts, pieces, strict=True))
    missing = sorted(set(wanted) - set(converted))
    wrong = [k for k in converted if k in wanted and converted[k].shape != wanted[k]]
    if missing or wrong:
        what = f"lacks {len(missing)} tensors, {missing[0]} the first" if missing else f"has another shape for {wrong[0]}"
        raise ValueError(f"{path} {what}; is it the checkpoint of another stage?")
    model.load_state_dict(converted)
    return model.eval()


def split_heads(tensor: Tensor, parts: int) -> list[Tensor]:
    """Query, key and value of a projection that stores them head by head: [heads * parts * 64, ...] -> [heads * 64, ...]."""
    heads = tensor.unflatten(0, (-1, parts, HEAD_DIM))
    return [heads[:, n].flatten(0, 1).contiguous() for n in range(parts)]


def prior_names(layers: int) -> Names:
    yield from ((new, old, "") for new, old in _PRIOR.items())
    yield "positional_embedding", "positional_embedding", ""
    yield "prd_embedding", "prd_emb", ""
    for n in range(layers):
        here, there = f"transformer_blocks.{n}", f"transformer.resblocks.{n}"
        yield from ((f"{here}.{new}", f"{there}.{old}", "") for new, old in _PRIOR_LAYER.items())
        yield "|".join(f"{here}.attn1.to_{p}" for p in "qkv"), f"{there}.attn.c_qkv", ""


def unet_names(levels: Sequence[Level], layers: int) -> Names:
    """Names of a UNet whose blocks have running numbers in the original and are grouped by level here."""
    yield from (
        (new, old, "")
        for new, old in (
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("conv_in", "input_blocks.0.0"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
        )
    )
    number = 1
    for level, facts in enumerate(levels):
        for n in range(layers):
            yield from _resnet(f"down_blocks.{level}.resnets.{n}", f"input_blocks.{number}.0")
            if facts.attention:
                yield from _attention(f"down_blocks.{level}.attentions.{n}", f"input_blocks.{number}.1")
            number += 1
        if level + 1 < len(levels):
            yield from _resnet(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{number}.0")
            number += 1
    middle = levels[-1].attention
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    if middle:
        yield from _attention("mid_block.attentions.0", "middle_block.1")
    yield from _resnet("mid_block.resnets.1", "middle_block.2" if middle else "middle_block.1")
    number = 0
    for level, facts in enumerate(reversed(levels)):
        for n in range(layers + 1):
            yield from _resnet(f"up_blocks.{level}.resnets.{n}", f"output_blocks.{number}.0")
            if facts.attention:
                yield from _attention(f"up_blocks.{level}.attentions.{n}", f"output_blocks.{number}.1")
            number += 1
        if level + 1 < len(levels):  # the resnet that doubles the size shares the last one's number
            yield from _resnet(f"up_blocks.{level}.upsamplers.0", f"output_blocks.{number - 1}.{2 if facts.attention else 1}")


def _resnet(new: str, old: str) -> Names:
    yield from ((f"{new}.{a}", f"{old}.{b}", "") for a, b in _RESNET.items())


def _attention(new: str, old: str) -> Names:
    yield f"{new}.group_norm", f"{old}.norm", ""
    yield "|".join(f"{new}.to_{p}" for p in "qkv"), f"{old}.qkv", "conv1d"
    yield "|".join(f"{new}.add_{p}_proj" for p in "kv"), f"{old}.encoder_kv", "conv1d"
    yield f"{new}.to_out.0", f"{old}.proj_out", "conv1d"


# ---------------------------------------------------------------------------------------------- networks


def convert_prior(path: str | Path, stats: str | Path) -> PriorTransformer:
    """The prior of Karlo or Kandinsky 2."""
    (state,) = read_states(path, "model")
    mean, std = read_stats(stats)
    width, dim = _shape(state, "clip_img_proj.weight", path)
    layers = len({k.split(".")[2] for k in state if k.startswith("transformer.resblocks.")})
    model = PriorTransformer(
        num_attention_heads=width // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=layers,
        embedding_dim=dim,
        num_embeddings=_shape(state, "positional_embedding", path)[1] - 4,
    )
    if mean.shape != (1, dim):
        raise ValueError(f"{stats} has {mean.shape[1]} dimensions, but {path} makes embeddings of {dim}")
    return convert(model, state, prior_names(layers), path, {"clip_mean": mean, "clip_std": std})


def convert_unet(state: State, model_class: Callable[..., ModelT], size: int, path: str | Path) -> ModelT:
    """The decoder (`UNet2DConditionModel`) or a step of the super-resolution (`UNet2DModel`); `path` is for messages."""
    levels, layers = _levels(state, path)
    cross = next((v.shape[1] for k, v in state.items() if k.endswith("encoder_kv.weight")), None)
    config: dict[str, Any] = {
        "sample_size": size,
        "in_channels": _shape(state, "input_blocks.0.0.weight", path)[1],
        "out_channels": _shape(state, "out.2.weight", path)[0],
        "layers_per_block": layers,
        "block_out_channels": tuple(f.width for f in levels),
        "resnet_time_scale_shift": "scale_shift" if _shape(state, _EMB, path)[0] == 2 * levels[0].width else "default",
    }
    if model_class is UNet2DConditionModel:
        config |= {
            "down_block_types": tuple(
                "SimpleCrossAttnDownBlock2D" if f.attention else "ResnetDownsampleBlock2D" for f in levels
            ),
            "up_block_types": tuple(
                "SimpleCrossAttnUpBlock2D" if f.attention else "ResnetUpsampleBlock2D" for f in reversed(levels)
            ),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "cross_attention_dim": cross,
            "attention_head_dim": HEAD_DIM,
            "class_embed_type": "identity",
        }
        if cross is None:
            raise ValueError(f"{path} attends to no text; is it the checkpoint of another stage?")
    else:
        config |= {
            "down_block_types": ("ResnetDownsampleBlock2D",) * len(levels),
            "up_block_types": ("ResnetUpsampleBlock2D",) * len(levels),
            "add_attention": False,
        }
    return convert(model_class(**config), state, unet_names(levels, layers), path)


def convert_text_proj(state: State, path: str | Path) -> UnCLIPTextProjModel:
    """The projections in Karlo's decoder checkpoint, beside its UNet; `path` is for messages."""
    cross, dim = _shape(state, "text_seq_proj.0.weight", path)
    model = UnCLIPTextProjModel(
        clip_extra_context_tokens=_shape(state, "clip_tok_proj.weight", path)[0] // cross,
        clip_embeddings_dim=dim,
        time_embed_dim=_shape(state, "clip_emb.weight", path)[0],
        cross_attention_dim=cross,
    )
    names = [(new, old, "") for new, old in _TEXT_PROJ.items()]
    names.append(("learned_classifier_free_guidance_embeddings", "cf_param", ""))
    return convert(model, state, iter(names), path)


def _shape(state: State, name: str, path: str | Path) -> torch.Size:
    if name not in state:
        raise ValueError(f"{path} lacks {name}; is it the checkpoint of another stage?")
    return state[name].shape


def _levels(state: State, path: str | Path) -> tuple[list[Level], int]:
    """Width and attention of a UNet's levels, and its blocks a level: a level begins where the width changes."""
    numbers = sorted({int(k.split(".")[1]) for k in state if k.startswith("input_blocks.")})
    if len(numbers) < 2:
        raise ValueError(f"{path} holds no UNet; is it the checkpoint of another stage?")
    starts = [n for n in numbers[1:] if n == 1 or f"input_blocks.{n}.0.skip_connection.weight" in state]
    levels = [
        Level(state[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0], f"input_blocks.{n}.1.qkv.weight" in state)
        for n in starts
    ]
    return levels, numbers[-1] + 1 - starts[-1]


# ---------------------------------------------------------------------------------------------- pipelines


def prior_scheduler() -> UnCLIPScheduler:
    return UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)


def convert_karlo(  # noqa: PLR0913 - a public call
    prior: Path, decoder: Path, super_resolution: Path, stats: Path, out: Path, clip: str = CLIP_MODEL, force: bool = False
) -> Path:
    """Karlo's four original files as a pipeline folder; -> the folder. Raises ValueError for a file that is not its stage."""
    with new_folder(out, force) as folder:
        (decoder_state,) = read_states(decoder, "model")
        first, last = read_states(super_resolution, "model_first_steps", "model_last_step")
        components = {
            "prior": convert_prior(prior, stats),
            "decoder": convert_unet(decoder_state, UNet2DConditionModel, 64, decoder),
            "text_proj": convert_text_proj(decoder_state, decoder),
            "super_res_first": convert_unet(first, UNet2DModel, 256, super_resolution),
            "super_res_last": convert_unet(last, UNet2DModel, 256, super_resolution),
            **clip_text(clip),
            **clip_image(clip),
            "prior_scheduler": prior_scheduler(),
            "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
            "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
        }
        UnCLIPPipeline(**components).save_pretrained(folder)
    return out


def convert_kandinsky_prior(prior: Path, stats: Path, out: Path, clip: str = CLIP_MODEL, force: bool = False) -> Path:
    """A Kandinsky 2 prior as a folder for `UnCLIPPriorPipeline`; -> the folder."""
    with new_folder(out, force) as folder:
        parts = {"prior": convert_prior(prior, stats), "prior_scheduler": prior_scheduler(), **clip_text(clip)}
        save_components(folder, parts, pipeline="UnCLIPPriorPipeline")
    return out
