"""Common concepts as two models sample them, side by side, from two reports of `unclip evaluate --only pairs`.

    unclip evaluate OLD_MODEL --out old --only pairs
    unclip evaluate NEW_MODEL --out new --only pairs
    python benchmarks/pairs.py old new [--out pairs.html]

Writes a page that needs nothing beside it and, under the same name, one PNG with all pairs. Both models' image n has the seed
of its report + n; nothing is selected.
"""

import argparse
import base64
import html
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, SIDE, GAP, NAME = 6, 128, 12, 18
STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em}"
    "main{display:flex;flex-wrap:wrap;gap:18px}figure{margin:0}figcaption{font-size:13px;padding-top:2px}"
    "img{width:256px;height:256px;border:1px solid #ddd;margin-right:4px}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="the folder that `unclip evaluate` wrote of the earlier model")
    parser.add_argument("new", type=Path, help="that of the later one")
    parser.add_argument("--out", type=Path, default=Path("pairs.html"))
    options = parser.parse_args()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (options.old, options.new)]
    for folder, facts in zip((options.old, options.new), reports, strict=True):
        if "pairs" not in facts["results"]:
            parser.error(f"{folder} has no common concepts; run `unclip evaluate MODEL --out {folder} --only pairs`")
    pairs = matched(options.old, options.new, *(facts["results"]["pairs"] for facts in reports))
    options.out.write_text(page(pairs, reports))
    sheet(pairs).save(options.out.with_suffix(".png"), optimize=True)
    print(options.out, options.out.with_suffix(".png"))


def matched(old: Path, new: Path, before: dict, after: dict) -> list[tuple[str, Path, Path]]:
    """The concepts that both reports have, each with the two files."""
    files = dict(zip(before["prompts"], before["pictures"], strict=True))
    both = zip(after["prompts"], after["pictures"], strict=True)
    return [(text, old / "pictures" / files[text], new / "pictures" / name) for text, name in both if text in files]


def page(pairs: list[tuple[str, Path, Path]], reports: list[dict]) -> str:
    """All pairs as one page of HTML."""
    figures = "".join(
        f"<figure>{embedded(old)}{embedded(new)}<figcaption>{html.escape(text)}</figcaption></figure>"
        for text, old, new in pairs
    )
    made = "".join(f"<pre>{html.escape(facts['command'])}</pre>" for facts in reports)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Pairs</title><style>{STYLE}</style></head><body>'
        f"<h1>{len(pairs)} common concepts, old on the left, new on the right</h1>{made}<main>{figures}</main></body></html>\n"
    )


def embedded(file: Path) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def sheet(pairs: list[tuple[str, Path, Path]]) -> Image.Image:
    """All pairs as one image, old beside new."""
    width, height = 2 * SIDE + GAP, SIDE + NAME
    whole = Image.new("RGB", (COLUMNS * width, -(-len(pairs) // COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for n, (text, *files) in enumerate(pairs):
        left, top = n % COLUMNS * width, n // COLUMNS * height
        draw.text((left + 2, top + 2), text, fill="black", font=font)
        for place, file in enumerate(files):
            with Image.open(file) as image:
                resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            whole.paste(resized, (left + place * SIDE, top + NAME))
    return whole


if __name__ == "__main__":
    main()
