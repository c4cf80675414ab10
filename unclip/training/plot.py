"""Loss curves of training runs as one image, from their `log.jsonl`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LEVEL = re.compile(r"[tc]\d+")  # quarters of the schedule, or of the autoregressive prior's components
NOT_DRAWN = {"step", "samples", "seconds", "rate", "images_per_s", "loss", "grad_norm"}


def read_log(run: Path) -> dict[str, Rows]:
    """A run's logged rows by kind, "train" and "validation", in order of step.

    Of a step that was logged twice, before and after a kill, the last is kept. Raises ValueError, naming the file, for a
    run without a log.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {run} is no training run, or has not logged yet")
    kept: dict[str, dict[int, dict]] = {"train": {}, "validation": {}}
    lines = path.read_text(errors="replace", encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):  # killed in the middle of it
                continue
            raise ValueError(f"{path}, line {number} is not JSON") from None
        if not isinstance(row, dict) or not {"step", "samples"} <= row.keys():
            raise ValueError(f"{path}, line {number} is no row of a training run: {line[:80]}")
        kept.setdefault(row.get("kind", "train"), {})[row["step"]] = row
    if not kept["train"]:
        raise ValueError(f"{path} has no row of training yet")
    return {kind: [rows[step] for step in sorted(rows)] for kind, rows in kept.items()}


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Draw the runs' losses against the samples seen, their losses by level, and what else validation measured; -> `out`.

    Raises ValueError for a run without a log, and where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise ValueError("matplotlib is not installed; install it with: pip install 'unclip[train]'") from None
    logs = {_name(run, runs): read_log(run) for run in runs}
    measured = sorted({k for log in logs.values() for row in log["validation"] for k in _numbers(row)})
    panels = ["loss", *(f"levels {n}" for n, log in logs.items() if _levels(log)), *(["measured"] if measured else [])]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 5.2 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    axis = iter(axes)
    losses = next(axis)
    for number, (name, log) in enumerate(logs.items()):
        _curve(losses, log["train"], "loss", f"{name}, training", f"C{number}", thin=True)
        _curve(losses, log["validation"], "loss", f"{name}, held out", f"C{number}")
    _finish(losses, "loss", EngFormatter(), positive=_positive(logs.values(), {"loss"}))
    for name, log in logs.items():
        if not _levels(log):
            continue
        chart = next(axis)
        for number, level in enumerate(_levels(log)):
            _curve(chart, log["train"], level, f"{level}, training", f"C{number}", thin=True)
            _curve(chart, log["validation"], level, f"{level}, held out", f"C{number}")
        what = "noise level (t0 the least)" if _levels(log)[0].startswith("t") else "quarter of the components"
        title = f"loss by {what}" + (f": {name}" if len(logs) > 1 else "")
        _finish(chart, title, EngFormatter(), positive=_positive([log], set(_levels(log))))
    if measured:
        chart = next(axis)
        for number, (name, log) in enumerate(logs.items()):
            for style, key in zip(("-", "--", ":", "-.") * len(measured), measured, strict=False):
                label = f"{name}, {key}" if len(logs) > 1 else key
                _curve(chart, log["validation"], key, label, f"C{number if len(logs) > 1 else measured.index(key)}", style)
        _finish(chart, "held out", EngFormatter(), positive=False)
    partial = out.with_name(out.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(out)
    return out


def _name(run: Path, runs: Sequence[Path]) -> str:
    """A run's folder, with as many of those above it as tell it from the others."""
    parts = run.resolve().parts
    others = [r.resolve().parts for r in runs if r.resolve().parts != parts]
    enough = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
    return "/".join(parts[-enough:])


def _levels(log: dict[str, Rows]) -> list[str]:
    return sorted({k for row in (*log["train"], *log["validation"]) for k in row if LEVEL.fullmatch(k)})


def _numbers(row: dict[str, Any]) -> list[str]:
    """What a row of validation measures beside losses; counts of what was looked at are no measure."""
    return [k for k, v in row.items() if isinstance(v, float) and k not in NOT_DRAWN and not LEVEL.fullmatch(k) and v % 1]


def _positive(logs: Any, keys: set[str]) -> bool:
    return all(row[k] > 0 for log in logs for rows in log.values() for row in rows for k in keys & row.keys())


def _curve(chart: Any, rows: Rows, key: str, label: str, colour: str, style: str = "-", thin: bool = False) -> None:
    points = [(row["samples"], row[key]) for row in rows if key in row]
    if not points:
        return
    marker = "o" if not thin or len(points) == 1 else None
    chart.plot(
        *zip(*points, strict=True),
        style,
        label=label,
        color=colour,
        linewidth=1 if thin else 1.8,
        alpha=0.5 if thin else 1,
        marker=marker,
        markersize=3,
    )


def _finish(chart: Any, title: str, format: Any, positive: bool) -> None:
    chart.set_title(title)
    chart.set_xlabel("samples")
    chart.xaxis.set_major_formatter(format)
    if positive:
        chart.set_yscale("log")
    chart.grid(alpha=0.25, which="both")
    chart.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
