"""DALL·E 1's abilities as a table, each with its score and images, from a report of `unclip evaluate`.

    unclip evaluate emoji --split test --out report --only composition --only rectangle
    python benchmarks/abilities.py report [--out docs/abilities.png]

Prints the table as Markdown and draws the first images of each ability, nothing selected. An ability whose part the report
does not have is listed as not measured.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from words import broken

# ability, what must be right, and where the report has it: part, kind, number
ABILITIES = (
    ("control of attributes: colour", "object and colour", "composition", "colour", "all of it"),
    ("control of attributes: number", "object and number", "composition", "count", "all of it"),
    ("control of attributes: ground", "object and ground", "composition", "background", "all of it"),
    ("control of attributes: style", "object and style", "composition", "style", "all of it"),
    ("several objects", "both objects", "composition", "pair", "all of it"),
    ("several objects and their places", "both objects and the place", "composition", "relation", "all of it"),
    ("regenerating a rectangle", "the name, among all", "rectangle", None, "first"),
    ("combining unrelated concepts", "both objects", "composition", "unrelated", "all of it"),
)
COLUMNS, CELL, NAME = 6, 96, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the folder that `unclip evaluate` wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/abilities.png"))
    options = parser.parse_args()
    facts = json.loads((options.report / "report.json").read_text())
    print("| ability | what must be right | drawn | real renders | chance | images |\n|---|---|---|---|---|---|")
    rows = []
    for ability, asked, part, kind, number in ABILITIES:
        group = facts["results"].get(part, {})
        group = group.get(kind, {}) if kind else group
        if number not in group:
            print(f"| {ability} | {asked} | not measured | | | |")
            continue
        found = group[number]
        files = [options.report / "pictures" / name for name in group["pictures"]]
        rows.append((ability, list(zip(group["prompts"], files, strict=True))))
        real, chance = share(found["real"]["value"]), share(found["chance"])
        print(f"| {ability} | {asked} | {said(found['right'])} | {real} | {chance} | row {len(rows)} |")
    if rows:
        sheet(rows).quantize(256, dither=Image.Dither.NONE).save(options.out, optimize=True)
        print(f"\n![Rows 1 to {len(rows)}: the first {COLUMNS} images of each]({options.out})\n\nMade by `{facts['command']}`.")


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def said(estimate: dict) -> str:
    low, high = (share(estimate[end]) for end in ("low", "high"))
    return f"{share(estimate['value'])} ({low} to {high}, {estimate['n']} images)"


def sheet(rows: list[tuple[str, list[tuple[str, Path]]]]) -> Image.Image:
    """For each ability its name and its first images with their sentences."""
    height = NAME + CELL + 30
    page = Image.new("RGB", (COLUMNS * (CELL + 40), len(rows) * height), "white")
    draw, font, small = ImageDraw.Draw(page), ImageFont.load_default(13), ImageFont.load_default(10)
    for n, (ability, images) in enumerate(rows):
        draw.text((4, n * height + 3), f"{n + 1}. {ability}", fill="black", font=font)
        for k, (prompt, path) in enumerate(images[:COLUMNS]):
            left, top = k * (CELL + 40) + 4, n * height + NAME
            with Image.open(path) as image:
                page.paste(image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            for number, line in enumerate(broken(prompt, CELL + 34, draw, small)[:2]):
                draw.text((left, top + CELL + 1 + 12 * number), line, fill="black", font=small)
    return page


if __name__ == "__main__":
    main()
