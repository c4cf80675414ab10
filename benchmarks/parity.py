"""Compare this package's pipelines with diffusers' deprecated ones, pixel by pixel: the table of docs/parity.md.

    PYTHONPATH=.:tests python benchmarks/parity.py

Toy networks in Karlo's layout, in float64. How long larger ones take is `benchmarks/text_to_256.py`'s to say.
"""

import tempfile
import time
from pathlib import Path

import karlo
import numpy as np
import torch
from diffusers.utils import logging

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline

OURS = {"UnCLIPPipeline": UnCLIPPipeline, "UnCLIPImageVariationPipeline": UnCLIPImageVariationPipeline}
SENTENCES = ["a teddy", "two red moons", "z"]


def main() -> None:
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        pixels(Path(folder))


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


def timed(pipe, arguments: dict) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    images = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    return images, time.perf_counter() - start


if __name__ == "__main__":
    main()
