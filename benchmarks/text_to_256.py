"""Text to 256 px through Karlo's layout at a quarter of its width: this package beside diffusers' deprecated pipeline.

    python benchmarks/text_to_256.py [--rounds 5] [--steps 25 25 7] [--device cuda] [--compile]

The same random checkpoint, each way in a process of its own, drawing in turn (A B C A B C ...) after a warm-up: the deprecated
pipeline as it ships (float32), the same given bfloat16 and channels_last by hand, ours as `from_pretrained` gives it, and ours
with low_memory (once, for its memory). Prints medians, the ratios' spread, and each process's peak memory above its imports, on
a GPU that of the GPU. `--compile` adds ours compiled, which takes minutes first.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import in_turn, machine, now, serve, spread

WAYS = {
    "as it ships": "deprecated, float32",
    "by hand": "deprecated, bfloat16 and channels_last by hand",
    "ours": "ours",
    "ours, low memory": "ours, low_memory",
    "ours, compiled": "ours, compiled",
}
IMPORTED = {
    "diffusers": ("PriorTransformer", "UNet2DConditionModel", "UNet2DModel"),
    "transformers": ("CLIPTextModelWithProjection", "CLIPTokenizer"),
}
PROMPT = "a teddy bear wearing a red hat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs=3, default=[25, 25, 7], metavar=("PRIOR", "DECODER", "UPSAMPLER"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--write", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(Path(options.write))
    elif options.worker:
        work(*options.worker, options.steps, options.device)
    else:
        compare(options.rounds, options.steps, options.device, options.compile)


def compare(rounds: int, steps: list[int], device: str, compiled: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write", folder], check=True)
        command = [sys.executable, __file__, "--steps", *map(str, steps), "--device", device, "--worker"]
        ways = {way: name for way, name in WAYS.items() if compiled or way != "ours, compiled"}
        once = ["ours, low memory"]  # its time is no question
        answers = in_turn({way: [*command, way, folder] for way in ways}, rounds, once)
    memory = {way: said[-1]["memory"] for way, said in answers.items()}
    taken = {way: [answer["seconds"] for answer in said[:-1]] for way, said in answers.items()}
    print(f"{machine(device)}; {'/'.join(map(str, steps))} steps, {rounds} rounds\n")
    print("| way | s | its time / ours, least to largest | peak memory, MB | of as it ships |")
    print("|---|---|---|---|---|")
    for way, name in ways.items():
        times = f"{statistics.median(taken[way]):.3g} | {spread(taken[way], taken['ours'])}" if taken[way] else "- | -"
        share = memory[way] / memory["as it ships"]
        print(f"| {name} | {times} | {memory[way] / 1e6:.0f} | {share:.2f} |")


def work(way: str, folder: str, steps: list[int], device: str) -> None:
    """Draw an image at each turn, and say what that took; at the end, the peak of memory above the bare imports."""
    import torch

    package = "unclip" if way.startswith("ours") else "diffusers.pipelines.deprecated.unclip"
    for module, names in {package: ("UnCLIPPipeline",), **IMPORTED}.items():
        for name in names:
            getattr(importlib.import_module(module), name)  # some come only when they are named
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = ("prior_num_inference_steps", "decoder_num_inference_steps", "super_res_num_inference_steps")
    pipes = []

    def draw() -> dict:
        pipes[:] = pipes or [load(way, Path(folder), device)]
        start = now(device)
        pipes[0](PROMPT, generator=torch.Generator().manual_seed(0), **dict(zip(names, steps, strict=True)))
        return {"seconds": now(device) - start}

    def peak() -> dict:
        if device != "cpu":
            return {"memory": torch.cuda.max_memory_allocated()}
        return {"memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imported) * 1024}

    serve(draw, peak)


def load(way: str, folder: Path, device: str):
    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()
    if way.startswith("ours"):
        from unclip import UnCLIPPipeline

        pipe = UnCLIPPipeline.from_pretrained(folder, low_memory=way == "ours, low memory").to(device)
        if way == "ours, compiled":
            pipe.compile()
    else:
        pipe = deprecated(folder).to(device)
        if way == "by hand":
            by_hand(pipe)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    return pipe


def deprecated(folder: Path):
    """Diffusers' pipeline, part by part: it cannot load a folder by itself any more."""
    import diffusers
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    classes = {"prior": diffusers.PriorTransformer, "decoder": diffusers.UNet2DConditionModel, "text_proj": UnCLIPTextProjModel}
    classes |= {"text_encoder": CLIPTextModelWithProjection, "tokenizer": CLIPTokenizer}
    classes |= dict.fromkeys(("super_res_first", "super_res_last"), diffusers.UNet2DModel)
    classes |= dict.fromkeys((f"{name}_scheduler" for name in ("prior", "decoder", "super_res")), diffusers.UnCLIPScheduler)
    return UnCLIPPipeline(**{name: kind.from_pretrained(folder / name) for name, kind in classes.items()})


def by_hand(pipe) -> None:
    """What a user can do to the deprecated pipeline; its antialiased resize has no bfloat16 kernel."""
    import torch
    import torch.nn.functional as F

    pipe.to(torch.bfloat16)
    for name in ("decoder", "super_res_first", "super_res_last"):
        getattr(pipe, name).to(memory_format=torch.channels_last)
    resize = F.interpolate

    def in_float32(pixels, *arguments, **settings):
        return (
            resize(pixels.float(), *arguments, **settings).to(pixels.dtype)
            if settings.get("antialias")
            else resize(pixels, *arguments, **settings)
        )

    F.interpolate = in_float32


def write(folder: Path) -> None:
    """A checkpoint of random weights in Karlo's layout: depth as there, a quarter of the width."""
    import torch
    from diffusers import PriorTransformer, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    from unclip import UnCLIPPipeline, UnCLIPScheduler, UnCLIPTextProjModel

    tokenizer = letter_tokenizer(folder / "words")
    dim, wide = 192, (80, 160, 240, 320)
    text = text_config(tokenizer, dim)
    torch.manual_seed(0)
    parts = {
        "prior": PriorTransformer(num_attention_heads=8, num_layers=20, embedding_dim=dim, num_embeddings=77),
        "decoder": UNet2DConditionModel(
            sample_size=64,
            layers_per_block=3,
            block_out_channels=wide,
            down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
            up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            in_channels=3,
            out_channels=6,
            cross_attention_dim=384,
            norm_num_groups=16,
            attention_head_dim=16,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        ),
        "text_encoder": CLIPTextModelWithProjection(text),
        "tokenizer": tokenizer,
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=dim, time_embed_dim=4 * wide[0], cross_attention_dim=384),
        "prior_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }
    for name in ("super_res_first", "super_res_last"):
        parts[name] = super_resolution(wide)
    UnCLIPPipeline(**parts).save_pretrained(folder)


def letter_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters, from files that are written to `folder`."""
    from transformers import CLIPTokenizer

    folder.mkdir()
    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    vocabulary = ["!", *letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text_config(tokenizer: Any, dim: int) -> Any:
    """Of a text encoder of 12 layers and width `dim`."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        projection_dim=dim,
        num_hidden_layers=12,
        num_attention_heads=3,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def super_resolution(wide: tuple[int, ...]) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
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


if __name__ == "__main__":
    main()
