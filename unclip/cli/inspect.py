"""`unclip inspect`: what an image says of itself."""

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print what an image's metadata say: whether it is synthetic (IPTC), and the settings that it was sampled with.

    Metadata are not proof: anybody can write or remove them.
    """
    from ..io.images import open_with_metadata, stated

    opened = open_with_metadata(image)
    found = {
        "format": opened.format or "unknown",
        "size": f"{opened.width}x{opened.height}",
        "digital_source_type": "not stated",
    }
    found |= stated(opened)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        for name, value in found.items():
            print(f"{name}: {' '.join(value.split())}")
