"""Commands that work on an image's embedding and inverted noise: variations, interpolation, edits, inpainting."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .images import check_free, embedding_bar, load, output_files, row, save, write
from .options import DecoderSteps, Device, Dtype, Force, Model, NoMetadata, Sampler, Seed, Size, Transparent


def variations(  # noqa: PLR0913 - the parameters of a command are its options
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to vary.")],
    out: Annotated[Path, typer.Option(help="Folder of the variations.")],
    count: Annotated[int, typer.Option("-n", "--num-images", help="How many.")] = 4,
    eta: Annotated[float | None, typer.Option(help="Keep the image's noise but for this share of fresh noise, 0 to 1.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text to steer by.")] = None,
    size: Size = None,
    seed: Seed = 0,
    decoder_steps: DecoderSteps = None,
    sampler: Sampler = None,
    transparent: Transparent = False,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Draw other images with the same content and style."""
    import torch

    from ..io.images import open_image
    from ..pipelines import UnCLIPImageVariationPipeline
    from ..pipelines.settings import MAX_IMAGES

    if not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {count}")
    original = open_image(image)
    files = output_files(out, [f"{image.stem}-{seed + n}" for n in range(count)], force)
    pipe: Any = UnCLIPImageVariationPipeline.from_pipe(load(model, device, dtype))
    for n, path in enumerate(files):
        drawn = pipe(
            original,
            generator=[torch.Generator().manual_seed(seed + n)],
            prompt=prompt,
            eta=eta,
            size=size,
            decoder_num_inference_steps=decoder_steps,
            sampler=sampler,
        ).images[0]
        facts = {"variation_of": image.name, "seed": str(seed + n), "model": model}
        facts |= ({"eta": str(eta)} if eta is not None else {}) | ({"prompt": prompt} if prompt else {})
        save(drawn, path, None if no_metadata else facts, transparent)
        print(path)


def interpolate(  # noqa: PLR0913 - the parameters of a command are its options
    a: Annotated[str, typer.Argument(metavar="A", help="An image file or a prompt.")],
    b: Annotated[str, typer.Argument(metavar="B", help="An image file or a prompt.")],
    out: Annotated[Path, typer.Option(help="Folder of the images, their grid and their animation.")],
    steps: Annotated[int, typer.Option(help="Images of the path, its ends among them.")] = 9,
    noise: Annotated[str, typer.Option(help="fixed: one for all; interpolated: from one end's own to the other's.")] = "fixed",
    size: Size = None,
    seed: Seed = 0,
    decoder_steps: DecoderSteps = None,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Draw the path from one image or sentence to another: single images, a grid and an animated WebP."""
    import torch

    from ..io.images import xmp_packet
    from ..pipelines import UnCLIPInterpolationPipeline

    if not 2 <= steps <= 1000:
        raise ValueError(f"steps must be from 2 to 1000, got {steps}")
    ends = [image_or_text(a), image_or_text(b)]
    files = [out / f"{n:03d}.png" for n in range(steps)] + [out / "grid.png", out / "path.webp"]
    check_free(files, force)
    pipe: Any = UnCLIPInterpolationPipeline.from_pipe(load(model, device, dtype))
    drawn = pipe(
        ends,
        steps=steps,
        noise=noise,
        generator=torch.Generator().manual_seed(seed),
        size=size,
        decoder_num_inference_steps=decoder_steps,
    ).images
    facts = {"from": a, "to": b, "seed": str(seed), "model": model}
    for n, (path, result) in enumerate(zip(files, drawn, strict=False)):
        save(result, path, None if no_metadata else facts | {"share": f"{n / (steps - 1):.4f}"})
    save(row(drawn), files[-2], None if no_metadata else facts)
    there_and_back = drawn + drawn[-2:0:-1]
    animation: dict[str, Any] = {
        "format": "WEBP",
        "save_all": True,
        "append_images": there_and_back[1:],
        "duration": 120,
        "loop": 0,
        "xmp": xmp_packet({}),
    }
    write(files[-1], lambda file: there_and_back[0].save(file, **animation))
    for path in files:
        print(path)


def pca(  # noqa: PLR0913 - the parameters of a command are its options
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to probe.")],
    out: Annotated[Path, typer.Option(help="Folder of the images and their grid.")],
    counts: Annotated[
        list[int] | None, typer.Option("-k", "--components", help="How many to keep; may be given several times.")
    ] = None,
    of: Annotated[
        Path | None,
        typer.Option(help="Images whose principal components are meant: a folder, or a dataset; default: the model's own."),
    ] = None,
    save_axes: Annotated[Path | None, typer.Option(help="Also write the principal axes (.safetensors).")] = None,
    size: Size = None,
    seed: Seed = 0,
    decoder_steps: DecoderSteps = None,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Draw what the first principal components of an image's embedding hold, ever more of them."""
    import torch

    from ..io.images import open_image
    from ..pipelines import UnCLIPPCAPipeline
    from ..pipelines.axes import axes_of
    from ..pipelines.pca import COUNTS

    original = open_image(image)
    check_free([out / "grid.png"] + ([save_axes] if save_axes else []), force)
    pipe: Any = UnCLIPPCAPipeline.from_pipe(load(model, device, dtype))
    axes = axes_of(model, pipe.clip, of, embedding_bar)
    counts = counts or sorted({min(k, len(axes.axes)) for k in COUNTS})
    files = [out / f"{k:03d}.png" for k in counts] + [out / "grid.png"] + ([save_axes] if save_axes else [])
    check_free(files, force)
    settings: dict[str, Any] = {"size": size, "decoder_num_inference_steps": decoder_steps}
    drawn = pipe(original, axes, counts, generator=torch.Generator().manual_seed(seed), **settings).images
    facts = {"pca_of": image.name, "seed": str(seed), "model": model}
    for path, result, kept in zip(files, drawn, counts, strict=False):
        save(result, path, None if no_metadata else facts | {"components": str(kept)})
    save(row(drawn), out / "grid.png", None if no_metadata else facts | {"components": " ".join(map(str, counts))})
    if save_axes:
        write(save_axes, axes.save)
    for path in files:
        print(path)


def edit(  # noqa: PLR0913 - the parameters of a command are its options
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to change.")],
    target: Annotated[str, typer.Option("--to", help="What it should become.")],
    out: Annotated[Path, typer.Option(help="A .png file; a folder where several strengths are given.")],
    source: Annotated[str, typer.Option("--from", help="What it is; default: nothing in particular.")] = "",
    strength: Annotated[list[float] | None, typer.Option(help="How far to go, 0 to 1; may be given several times.")] = None,
    size: Size = None,
    seed: Seed = 0,
    decoder_steps: DecoderSteps = None,
    transparent: Transparent = False,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Change an image as one sentence differs from another (a text diff)."""
    import torch

    from ..io.images import open_image
    from ..pipelines import UnCLIPTextDiffPipeline

    strengths = strength or [0.35]
    original = open_image(image)
    files = output_files(out, [f"{image.stem}-{s:g}" for s in strengths], force)
    pipe: Any = UnCLIPTextDiffPipeline.from_pipe(load(model, device, dtype))
    steps: dict[str, Any] = {} if decoder_steps is None else {"decoder_num_inference_steps": decoder_steps}
    drawn = pipe(original, target, source, strengths, generator=torch.Generator().manual_seed(seed), size=size, **steps).images
    for path, result, share in zip(files, drawn, strengths, strict=True):
        facts = {"edit_of": image.name, "from": source, "to": target, "strength": f"{share:g}"}
        save(result, path, None if no_metadata else facts | {"seed": str(seed), "model": model}, transparent)
        print(path)


def inpaint(  # noqa: PLR0913 - the parameters of a command are its options
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to repaint in part.")],
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="An image of the same size, white where to repaint.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the whole image should show.")],
    out: Annotated[Path, typer.Option(help="A .png file.")],
    size: Size = None,
    seed: Seed = 0,
    decoder_steps: DecoderSteps = None,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Inpaint the white part of a mask; the rest of the image is kept to the pixel."""
    from ..io.images import open_image

    facts = {"inpaint_of": image.name, "mask": mask.name, "prompt": prompt, "seed": str(seed), "model": model}
    settings: dict[str, Any] = {"size": size, "decoder_num_inference_steps": decoder_steps}
    images = open_image(image), open_image(mask)
    path = _single_file(out, force)
    save(_inpainted((model, device, dtype), prompt, images, seed, settings), path, None if no_metadata else facts)
    print(path)


def outpaint(  # noqa: PLR0913 - the parameters of a command are its options
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to go on from.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the whole image should show.")],
    out: Annotated[Path, typer.Option(help="A .png file.")],
    left: Annotated[int | None, typer.Option(help="New pixels on this side, in the image's own pixels.")] = None,
    right: Annotated[int | None, typer.Option(help="As --left; without any of them a quarter on every side.")] = None,
    top: Annotated[int | None, typer.Option(help="As --left.")] = None,
    bottom: Annotated[int | None, typer.Option(help="As --left.")] = None,
    size: Size = None,
    seed: Seed = 0,
    decoder_steps: DecoderSteps = None,
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    no_metadata: NoMetadata = False,
) -> None:
    """Draw what lies beyond an image's edges."""
    from ..io.images import open_image, with_margins

    original = open_image(image)
    sides = (left, right, top, bottom)
    if all(side is None for side in sides):
        margins = (original.width // 4, original.width // 4, original.height // 4, original.height // 4)
    else:
        margins = (left or 0, right or 0, top or 0, bottom or 0)
    canvas, mask = with_margins(original, *margins)
    facts = {"outpaint_of": image.name, "margins": str(margins), "prompt": prompt, "seed": str(seed), "model": model}
    settings: dict[str, Any] = {"size": size, "decoder_num_inference_steps": decoder_steps}
    path = _single_file(out, force)
    save(_inpainted((model, device, dtype), prompt, (canvas, mask), seed, settings), path, None if no_metadata else facts)
    print(path)


def _single_file(out: Path, force: bool) -> Path:
    return output_files(out, [out.name or "repainted"], force)[0]


def _inpainted(source: tuple, prompt: str, images: tuple, seed: int, settings: dict) -> Any:
    """The inpainted image of `images`, an image and its mask; `source` is a model, a device and a dtype."""
    import torch

    from ..pipelines import UnCLIPInpaintPipeline

    pipe: Any = UnCLIPInpaintPipeline.from_pipe(load(*source))
    image, mask = images
    return pipe(prompt, image, mask, generator=[torch.Generator().manual_seed(seed)], **settings).images[0]


def image_or_text(word: str) -> Any:
    """The image, if `word` is an image file, else the prompt."""
    from ..io.images import SUFFIXES, open_image

    path = Path(os.path.expanduser(word))  # unlike Path.expanduser, it accepts a prompt that begins with ~
    if os.path.isfile(path) or path.suffix.lower() in SUFFIXES:
        return open_image(path)
    return word
