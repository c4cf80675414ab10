"""A model's results beside the project's targets, which are for the emoji model, split test."""

from collections.abc import Iterator
from typing import Any

from .metrics import Estimate
from .report import Table

Row = list[Any]  # what, the number found, its target, whether it is met
# Name, keys in the results, and the least value that is the target.
AT_LEAST: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("judge's R@1 on damaged renders", ("judge", "damaged"), 0.85),
    ("recognition R@1, of real renders'", ("recognition", "all", "share_of_real"), 0.97),
    ("everyday English R@1, of real renders'", ("everyday", "all", "share_of_real"), None),
    ("colour and object both right, of real's", ("composition", "colour", "all of it", "share_of_real"), 1.0),
    ("number and object both right, of real's", ("composition", "count", "all of it", "share_of_real"), 1.0),
    ("ground and object both right, of real's", ("composition", "background", "all of it", "share_of_real"), 1.0),
    ("two objects, both present, of real's", ("composition", "pair", "all of it", "share_of_real"), 0.92),
    ("two objects in the stated places, of real's", ("composition", "relation", "all of it", "share_of_real"), 0.90),
    ("upsampler 64 to 256, dB over bicubic", ("upsamplers", "64 to 256", "gain"), 4),
    ("upsampler 256 to 1024, dB over bicubic", ("upsamplers", "256 to 1024", "gain"), 4),
    ("attachments right", ("attachments", "all of it", "right"), 0.60),
    ("likeness from true embeddings, dB", ("likeness", "true embedding"), 24),
    ("likeness after the prior, dB", ("likeness", "prior"), 21.5),
    ("flat share of the object at 64 px", ("flatness", "64 px", "flat share", "sampled"), 0.25),
    ("flat share of the object at 256 px", ("flatness", "256 px", "flat share", "sampled"), 0.72),
    ("right style after the prior, of real's", ("style", "prior: style", "share_of_real"), 0.85),
    ("right style in images, of real's", ("style", "image: style judge", "share_of_real"), 0.88),
    ("the style judge on real renders", ("style", "judge"), 0.95),
    ("as many parts as the most similar icon", ("parts", "prior", "same"), None),
    ("names that repeat an icon of training", ("copies", "names", "rate"), None),
)
AT_MOST: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("colours for 90% of the object at 256 px", ("flatness", "256 px", "colours", "sampled"), 35),
    ("loss on training icons, t = 700", ("loss", "training icons", "700"), 0.012),
    ("loss on training icons, t = 800", ("loss", "training icons", "800"), 0.014),
    ("loss on training icons, t = 900", ("loss", "training icons", "900"), 0.017),
)
TIMES_FLOOR = 2
MEGABYTES = 95


def summary(results: dict[str, Any], title: str, note: str, weights: float) -> Table:
    """The targets of the parts that were measured, and of the `weights` in MB."""
    rows: list[Row] = []
    for what, keys, least in AT_LEAST:
        value = _at(results, *keys)
        if value is not None:
            rows.append(_row(what, value, f"at least {least:g}" if least else "", value.value >= least if least else None))
    for what, keys, most in AT_MOST:
        value = _at(results, *keys)
        if value is not None:
            rows.append(_row(what, value, f"at most {most:g}", value.value <= most))
    rows += _distance(results)
    rows += _prior(results)
    rows.append(_row("weights, MB", weights, f"at most {MEGABYTES}", weights <= MEGABYTES))
    return Table(title, ["what", "found", "target", "met"], rows, note)


def _at(results: dict[str, Any], *keys: str) -> Any:
    value: Any = results
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _row(what: str, value: Estimate | float | str, target: str = "", met: bool | None = None) -> Row:
    return [what, value, target, "" if met is None else "yes" if met else "no"]


def _distance(results: dict[str, Any]) -> Iterator[Row]:
    distance, floor = _at(results, "fidelity", "frechet_distance"), _at(results, "fidelity", "frechet_distance_floor")
    if distance is not None:
        times = distance.value / max(floor.value, 1e-12)
        yield _row("Fréchet distance, times the floor", times, f"at most {TIMES_FLOOR}", times <= TIMES_FLOOR)


def _prior(results: dict[str, Any]) -> Iterator[Row]:
    """Whether the prior is better than the text embedding in its place, with disjoint intervals."""
    prior, text = _at(results, "prior", "prior"), _at(results, "prior", "text embedding")
    if prior is None:
        return
    paired = _at(results, "prior", "ahead", "text embedding")
    for kind in ("names", "scenes"):
        ours, other = (way["frechet_distance"][kind] for way in (prior, text))
        apart = {"R@1": prior["r1"].low > text["r1"].high} if kind == "names" else {}
        apart["Fréchet distance"] = ours.high < other.low
        found = ", ".join(measure for measure, yes in apart.items() if yes) or "nothing"
        target = f"{' and '.join(apart)}, intervals apart"
        yield _row(f"prior ahead of the text embedding, {kind}", found, target, all(apart.values()))
        if kind == "names":
            yield _row("the same, R@1 more, prompt by prompt", paired["r1"])
        yield _row("the same, Fréchet distance less, prompt by prompt", paired["frechet_distance"][kind])
