"""Difference of a model's images from those of many steps, by the decoder's number of steps and timestep shift.

    python benchmarks/spacing.py emoji --data data/emoji [--steps 8 10 12 20] [--shifts 1 2 3 4] [--count 16]

Captions of training scenes, image embeddings drawn once, the same noise throughout; the root mean square difference of the 64
px images, of the range [0, 1], to those of `--reference` even steps.
"""

import argparse

import torch
from torch import Tensor

from unclip import UnCLIPPipeline, UnCLIPPriorPipeline
from unclip.data.scenes import IconSet, SceneSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 10, 12, 20])
    parser.add_argument("--shifts", type=float, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--reference", type=int, default=60)
    options = parser.parse_args()
    pipe = UnCLIPPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    scenes = SceneSampler(IconSet.load(options.data), "train", seed=0)
    captions = [scenes.scene(n).caption for n in range(options.count)]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(n) for n in range(options.count)]

    embeds = UnCLIPPriorPipeline.from_pipe(pipe)(captions, generator=generators()).image_embeds

    def draw(steps: int, shift: float) -> Tensor:
        settings = {"decoder_num_inference_steps": steps, "decoder_timestep_shift": shift, "size": pipe.sizes[0]}
        return pipe(captions, image_embeds=embeds, generator=generators(), output_type="pt", **settings).images.float()

    wanted = draw(options.reference, 1.0)
    print("| steps | " + " | ".join(f"shift {shift:g}" for shift in options.shifts) + " |")
    print("|---|" + "---|" * len(options.shifts))
    for steps in options.steps:
        row = [((draw(steps, shift) - wanted) ** 2).mean((1, 2, 3)).sqrt().mean().item() for shift in options.shifts]
        print(f"| {steps} | " + " | ".join(f"{value:.4f}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()
