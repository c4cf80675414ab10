"""The report: one JSON with every number, and one self-contained HTML page."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .metrics import Estimate


@dataclass
class Table:
    """Rows of cells; an `Estimate` is shown with its interval, in percent with `percent`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    percent: bool = False


@dataclass
class Sheet:
    """Images uint8 [N, 3, H, W] with a caption each; `marks` says whether the judge found each right."""

    title: str
    images: Tensor
    captions: Sequence[str]
    marks: Sequence[bool | None] | None = None
    side: int = 96


@dataclass
class Plot:
    """Lines with their intervals: `series` maps a name to (x, Estimate) pairs."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, Estimate]]]


@dataclass
class Part:
    """The results of one part of the evaluation: numbers for the JSON, and items for the page."""

    name: str
    results: dict[str, Any]
    shown: Sequence[Table | Sheet | Plot] = field(default_factory=list)


def write(folder: Path, command: str, protocol: dict, summary: Table, parts: list[Part], seconds: float) -> tuple[Path, Path]:
    """`report.json` and `report.html` in `folder`; -> their paths."""
    facts = {"command": command, "protocol": protocol, "summary": _rows(summary), "seconds": round(seconds)}
    facts["results"] = {part.name: part.results for part in parts}
    numbers, page = folder / "report.json", folder / "report.html"
    numbers.write_text(json.dumps(facts, indent=1, default=_plain) + "\n", encoding="utf-8")
    page.write_text(_page(command, protocol, summary, parts), encoding="utf-8")
    return numbers, page


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(value).items()}
    raise TypeError(f"{type(value).__name__} cannot be written to the report")


def _rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


# ---------------------------------------------------------------------------------------------- the page

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1a1a1a;background:#fff}
h1{font-size:1.6em}h2{margin-top:2.2em;border-bottom:1px solid #ddd}h3{margin-bottom:.3em}
table{border-collapse:collapse;margin:.4em 0}th,td{padding:.25em .8em;border-bottom:1px solid #eee;text-align:left}
td.n{font-variant-numeric:tabular-nums}.i{color:#777;font-size:.85em;white-space:nowrap}
pre{background:#f5f5f5;padding:.8em;overflow-x:auto;white-space:pre-wrap}p.note{color:#555;margin:.2em 0}
.sheet{display:flex;flex-wrap:wrap;gap:6px}figure{margin:0;font-size:11px;line-height:1.25}
figure img{display:block;border:2px solid #ddd;image-rendering:auto}
figure.yes img{border-color:#2a8a43}figure.no img{border-color:#c0392b}
figcaption{overflow-wrap:anywhere;padding:2px 0}svg{background:#fff;max-width:100%}
svg text{font:11px system-ui,sans-serif;fill:#444}
"""
_COLOURS = ("#2563a8", "#c0392b", "#2a8a43", "#8a5a00", "#6d3fa0")


def _page(command: str, protocol: dict, summary: Table, parts: list[Part]) -> str:
    body = ["<h1>unclip evaluate</h1>", "<p>Made by</p>", f"<pre>{html.escape(command)}</pre>", _table(summary)]
    for part in parts:
        body.append(f"<h2>{html.escape(part.name.capitalize())}</h2>")
        for item in part.shown:
            body.append(_table(item) if isinstance(item, Table) else _sheet(item) if isinstance(item, Sheet) else _plot(item))
    facts = html.escape(json.dumps(protocol, indent=1, default=_plain))
    body += ["<h2>Protocol</h2>", f"<pre>{facts}</pre>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>unclip evaluate</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in table.columns)
    rows = "".join("<tr>" + "".join(_cell(c, table.percent) for c in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f"<h3>{html.escape(table.title)}</h3>{note}<table><tr>{head}</tr>{rows}</table>"


def _cell(value: Any, percent: bool) -> str:
    if isinstance(value, Estimate):
        low, high = (_number(v, percent) for v in (value.low, value.high))
        return f'<td class="n">{_number(value.value, percent)} <span class="i">{low} to {high}, n {value.n}</span></td>'
    if isinstance(value, float):
        return f'<td class="n">{_number(value, percent)}</td>'
    return f"<td>{html.escape('' if value is None else str(value))}</td>"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}%" if percent else f"{value:.4g}"


def _sheet(sheet: Sheet) -> str:
    marks = sheet.marks or [None] * len(sheet.captions)
    cells = []
    for image, caption, mark in zip(sheet.images, sheet.captions, marks, strict=True):
        kind = "" if mark is None else " class=yes" if mark else " class=no"
        tag = f'<img width={sheet.side} height={sheet.side} src="{_data_url(image)}" alt="{html.escape(caption, quote=True)}">'
        cells.append(
            f'<figure style="width:{sheet.side}px"{kind}>{tag}<figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    return f"<h3>{html.escape(sheet.title)}</h3><div class=sheet>{''.join(cells)}</div>"


def _data_url(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _plot(plot: Plot) -> str:
    """A line plot as SVG: points with bars for their intervals."""
    width, height, left, bottom, top = 460, 240, 52, 36, 14
    points = [p for line in plot.series.values() for p in line]
    xs, lows, highs = [p[0] for p in points], [p[1].low for p in points], [p[1].high for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, *lows), max(highs)
    spread_x, spread_y = (x1 - x0) or 1.0, (y1 - y0) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - 110) * (x - x0) / spread_x
        return round(across, 1), round(height - bottom - (height - bottom - top) * (y - y0) / spread_y, 1)

    parts = []
    for step in range(5):
        y = y0 + spread_y * step / 4
        _, py = at(x0, y)
        parts.append(f'<line x1="{left}" x2="{width - 110}" y1="{py}" y2="{py}" stroke="#eee"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4}" text-anchor="end">{y:.3g}</text>')
    for x in sorted(set(xs)):
        parts.append(f'<text x="{at(x, y0)[0]}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>')
    for number, (name, line) in enumerate(plot.series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{px},{py}" for px, py in (at(x, e.value) for x, e in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, estimate in line:
            (px, low), (_, high), (_, middle) = (at(x, v) for v in (estimate.low, estimate.high, estimate.value))
            parts.append(f'<line x1="{px}" x2="{px}" y1="{low}" y2="{high}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{px}" cy="{middle}" r="3" fill="{colour}"/>')
        name = html.escape(name)
        parts.append(f'<text x="{width - 100}" y="{top + 14 + 16 * number}" style="fill:{colour}">{name}</text>')
    middle = (left + width - 110) / 2
    parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">{html.escape(plot.x_label)}</text>')
    parts.append(f'<text x="4" y="{top - 3}">{html.escape(plot.y_label)}</text>')
    return f'<h3>{html.escape(plot.title)}</h3><svg width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'
