"""Checkpoints of toy width in Karlo's layout, written by diffusers' deprecated classes as long as they exist.

`python tests/karlo.py` draws with them and writes what they drew to `tests/golden/karlo.json`, for the day they are gone.
"""

import json
import string
import tempfile
from pathlib import Path

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from unclip import UnCLIPScheduler, UnCLIPTextProjModel

DIM, TOKENS = 32, 12
GOLDEN = Path(__file__).parent / "golden" / "karlo.json"
PIXELS = 24  # evenly spaced ones are kept of each golden image


def fill(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights from `seed` alone, whatever the network's own initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.05 * noise + float(name.endswith("weight"))
    return network.eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only: every word is spelt."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(string.ascii_lowercase)
    words = ["!", *letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def upsampler(seed: int) -> UNet2DModel:
    return fill(
        UNet2DModel(
            sample_size=32,
            in_channels=6,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
            add_attention=False,
            resnet_time_scale_shift="scale_shift",
        ),
        seed,
    )


def parts(folder: Path, dim: int = DIM) -> dict:
    """Everything that the two pipelines take between them, in this package's classes and diffusers' stock ones."""
    words = tokenizer(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=dim,
        intermediate_size=64,
        projection_dim=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=64,
        projection_dim=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=dim, num_embeddings=TOKENS
    )
    prior.clip_mean.data, prior.clip_std.data = torch.full((1, dim), 0.1), torch.full((1, dim), 0.8)
    decoder = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=dim,
        attention_head_dim=8,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    proj = UnCLIPTextProjModel(clip_embeddings_dim=dim, time_embed_dim=32, cross_attention_dim=dim)
    return {
        "prior": fill(prior, 1),
        "decoder": fill(decoder, 2),
        "text_encoder": fill(CLIPTextModelWithProjection(text), 3),
        "tokenizer": words,
        "text_proj": fill(proj, 4),
        "feature_extractor": CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        "image_encoder": fill(CLIPVisionModelWithProjection(vision), 5),
        "super_res_first": upsampler(6),
        "super_res_last": upsampler(7),
        "prior_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }


def old(name: str, folder: Path):
    """A deprecated pipeline with the same weights: `name` is UnCLIPPipeline or UnCLIPImageVariationPipeline."""
    import diffusers
    from diffusers.pipelines.deprecated import unclip as deprecated
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as OldProj

    have = parts(folder)
    known = ("clip_extra_context_tokens", "clip_embeddings_dim", "time_embed_dim", "cross_attention_dim")
    config = {k: have["text_proj"].config[k] for k in known}
    proj = OldProj(**config)
    proj.load_state_dict(have["text_proj"].state_dict())
    have["text_proj"] = proj.eval()
    for key in have:
        if key.endswith("scheduler"):
            have[key] = diffusers.UnCLIPScheduler.from_config(have[key].config)
    other = ("feature_extractor", "image_encoder") if name == "UnCLIPPipeline" else ("prior", "prior_scheduler")
    pipe = getattr(deprecated, name)(**{k: v for k, v in have.items() if k not in other})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cases() -> dict[str, tuple[str, dict]]:
    """Name -> (pipeline, arguments) of the golden images."""
    steps = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 2}
    prior = {"prior_num_inference_steps": 3}
    embeddings = torch.randn(2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {
        "text": ("UnCLIPPipeline", {"prompt": ["a teddy", "two red moons"], **steps, **prior}),
        "text, unguided": (
            "UnCLIPPipeline",
            {"prompt": "a teddy", "prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0, **steps, **prior},
        ),
        "variation": ("UnCLIPImageVariationPipeline", {"image_embeddings": embeddings, **steps}),
    }


def pixels(pipe, arguments: dict) -> list[float]:
    """Evenly spaced values of what a pipeline draws with seed 0."""
    images = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    return [float(v) for v in images.ravel()[:: images.size // PIXELS]]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for case, (name, arguments) in cases().items():
            found[case] = pixels(old(name, Path(folder)).to(torch.float64), arguments)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    print(GOLDEN)


if __name__ == "__main__":
    main()
