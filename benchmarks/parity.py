"""Our pipelines beside diffusers' deprecated ones, the tables of docs/parity.md.

`PYTHONPATH=.:tests python benchmarks/parity.py`

The first table compares toy networks in Karlo's layout in float64, pixel by pixel. The second times networks of Karlo's
depth at a quarter of its width, in float32, with few steps.
"""

import tempfile
import time
from pathlib import Path

import karlo
import numpy as np
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.utils import logging

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline, UnCLIPTextProjModel

OURS = {"UnCLIPPipeline": UnCLIPPipeline, "UnCLIPImageVariationPipeline": UnCLIPImageVariationPipeline}
SENTENCES = ["a teddy", "two red moons", "z"]


def main() -> None:
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        pixels(Path(folder))
        times(Path(folder))


def pair(name: str, folder: Path, dtype: torch.dtype):
    old = karlo.old(name, folder).to(dtype)
    new = OURS[name].from_pipe(old)
    new.set_progress_bar_config(disable=True)
    return old, new.to(dtype)


def pixels(folder: Path) -> None:
    """Largest difference of a pixel in [0, 1], float64."""
    steps = {"decoder_num_inference_steps": 5, "super_res_num_inference_steps": 3}
    cases = []
    for batch in (1, 3):
        for guided in (True, False):
            scale = {} if guided else {"decoder_guidance_scale": 1.0}
            words = f"batch {batch}, {'guided' if guided else 'unguided'}"
            prior = scale and {"prior_guidance_scale": 1.0}
            text = {"prompt": SENTENCES[:batch], "prior_num_inference_steps": 5, **steps, **scale, **prior}
            embeds = torch.randn(batch, karlo.DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            cases.append((f"text to image, {words}", "UnCLIPPipeline", text))
            cases.append(
                (f"variation, {words}", "UnCLIPImageVariationPipeline", {"image_embeddings": embeds, **steps, **scale})
            )
    print("| case | largest difference | deprecated, s | ours, s |\n|---|---|---|---|")
    pipes = {name: pair(name, folder, torch.float64) for name in OURS}
    for case, name, arguments in cases:
        images, took = zip(*(timed(p, arguments) for p in pipes[name]), strict=True)
        print(f"| {case} | {np.abs(images[0] - images[1]).max():.1e} | {took[0]:.2f} | {took[1]:.2f} |", flush=True)


def timed(pipe, arguments: dict, warm: bool = False) -> tuple[np.ndarray, float]:
    def draw() -> np.ndarray:
        return pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images

    if warm:
        draw()
    start = time.perf_counter()
    return draw(), time.perf_counter() - start


def times(folder: Path) -> None:
    """One guided picture through networks of Karlo's depth at a quarter of its width."""
    wide = (80, 160, 240, 320)
    attending = ("SimpleCrossAttnDownBlock2D",) * 3
    have = karlo.parts(folder)
    have["prior"] = PriorTransformer(num_attention_heads=8, attention_head_dim=64, embedding_dim=karlo.DIM, num_embeddings=12)
    have["decoder"] = UNet2DConditionModel(
        sample_size=64,
        layers_per_block=3,
        block_out_channels=wide,
        down_block_types=("ResnetDownsampleBlock2D", *attending),
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        in_channels=3,
        out_channels=6,
        cross_attention_dim=384,
        norm_num_groups=16,
        attention_head_dim=16,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    have["text_proj"] = UnCLIPTextProjModel(clip_embeddings_dim=karlo.DIM, time_embed_dim=4 * wide[0], cross_attention_dim=384)
    for name in ("super_res_first", "super_res_last"):
        have[name] = UNet2DModel(
            sample_size=256,
            layers_per_block=3,
            block_out_channels=wide,
            down_block_types=("ResnetDownsampleBlock2D",) * 4,
            up_block_types=("ResnetUpsampleBlock2D",) * 4,
            in_channels=6,
            out_channels=3,
            norm_num_groups=16,
            add_attention=False,
            resnet_time_scale_shift="scale_shift",
        )
    for n, name in enumerate(("prior", "decoder", "text_proj", "super_res_first", "super_res_last")):
        karlo.fill(have[name], n)
    original, karlo.parts = karlo.parts, lambda folder: have
    try:
        old, new = pair("UnCLIPPipeline", folder, torch.float32)
    finally:
        karlo.parts = original
    prior = {"prior_num_inference_steps": 25, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    stages = {
        "25 prior steps, 2 decoder steps, 2 super-resolution steps": prior,
        "2 prior steps, 9 decoder steps, 2 super-resolution steps": prior
        | {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 9},
        "2 prior steps, 2 decoder steps, 4 super-resolution steps": prior
        | {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 4},
    }
    for pipe in (old, new):
        timed(pipe, {"prompt": "a teddy"} | stages["2 prior steps, 2 decoder steps, 4 super-resolution steps"])
    print(f"\n{torch.get_num_threads()} threads, float32\n\n| one guided picture | deprecated, s | ours, s |\n|---|---|---|")
    for case, steps in stages.items():
        took = [timed(pipe, {"prompt": "a teddy", **steps})[1] for pipe in (old, new)]
        print(f"| {case} | {took[0]:.1f} | {took[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
