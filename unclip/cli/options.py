"""Options that several commands share: one name, one help text, one meaning."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help='"emoji", a folder, or a Hub id.')]
Size = Annotated[int | None, typer.Option(help="Side in pixels: 64, 256 or 1024; default: the largest of the model.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the first of cuda, mps, cpu.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Force = Annotated[bool, typer.Option(help="Overwrite what exists.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps of the decoder.")]
Sampler = Annotated[
    str | None, typer.Option(help="Of the decoder: dpmsolver++2m, ddim, ancestral, or distilled where the model has it.")
]
DecoderSteps = Annotated[int | None, typer.Option("--decoder-steps", help="Denoising steps of the decoder.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of score, tab and name.")]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Read each network's weights when its stage begins, and let them go after it.")
]
Transparent = Annotated[bool, typer.Option("--transparent", help="Cut the white background out, for stickers.")]
NoMetadata = Annotated[
    bool,
    typer.Option("--no-metadata", help="Leave prompt, seed and model out of the file; it still says that it is synthetic."),
]
