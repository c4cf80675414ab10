"""Runs an evaluation; an interrupted one is resumed."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..clip.judge import Judge
from ..data.scenes import IconSet
from ..io.checkpoints import resolve
from ..io.hub import DISTILLED_FILE
from ..pipelines import UnCLIPPipeline
from ..runtime.config import nearest
from .context import SCENES, TURN, EvaluationContext, UnsupportedPart
from .parts import PARTS
from .parts.prior import depends_on_prior
from .prompts import check_split
from .report import Part, Table, write
from .sample_store import BATCH, GPU_BATCH, SampleStore
from .summary import summary

DRAWN_WITH = "drawn_with.json"


class Dependence(NamedTuple):
    """Components that only some images depend on: `affects` says by their name which, `message` is printed if they changed."""

    components: tuple[str, ...]
    affects: Callable[[str], bool]
    message: str


DEPENDENCES = {
    "prior": Dependence(
        ("prior", "prior_scheduler"), depends_on_prior, "another prior than before: what it leads to is drawn anew"
    ),
    "upsamplers": Dependence(
        ("super_res_first", "super_res_last", "super_res_scheduler", "upsampler_1024", "upsampler_1024_scheduler"),
        lambda name: name.startswith("upsampled-"),
        "other upsamplers than before: what they enlarge is drawn anew",
    ),
}


@dataclass
class Settings:
    """The settings of an evaluation; `sampling` replaces the model's own, `limit` and `scenes` as in `EvaluationContext`."""

    model: str = "emoji"
    split: str = "dev"
    out: Path = Path("report")
    only: list[str] = field(default_factory=list)
    limit: int | None = None
    data: str = "data/emoji"
    judge: str | None = None
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    scenes: int = SCENES

    def __post_init__(self) -> None:
        check_split(self.split)
        for name in self.only:
            if name not in PARTS:
                raise ValueError(f"unknown part {name!r}{nearest(name, PARTS)}; choose from {', '.join(PARTS)}")
        if self.limit is not None and self.limit < 8:
            raise ValueError(f"limit must be at least 8, got {self.limit}")
        if self.scenes < 100:
            raise ValueError(f"scenes must be at least 100, got {self.scenes}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must be from 0 to 2^62, got {self.seed}")
        self.sampling = {k: v for k, v in self.sampling.items() if v is not None}


def evaluate(settings: Settings, load: Callable[[str], UnCLIPPipeline], command: str) -> tuple[Path, ...]:
    """Run the selected parts and write the report.

    Images are kept in `out/pictures`: another run, also with other parts, another judge or a larger limit, samples only what
    is missing, and with another prior or other upsamplers what depends on them. Processes that were started together share
    the sampling, and the main one writes the report.

    Args:
        settings: The settings.
        load: Loads a pipeline by the name of a model.
        command: The command line, for the report.

    Returns:
        The paths of the JSON and of the page; () in other processes than the main one.

    Raises:
        ValueError: if `out` holds something else than this evaluation.
        FileNotFoundError: without the data.
    """
    began = time.monotonic()
    _check_folder(settings)
    judge = Judge.load(settings.judge or settings.split)
    icons = IconSet.load(settings.data)
    pipe = load(settings.model)
    pipe.set_progress_bar_config(disable=True)
    pipe._prepare()
    device = pipe._execution_device
    judge.to(device)
    drawn = _protocol_of_images(settings, pipe)
    sample_store = _open(settings, drawn, GPU_BATCH if device.type == "cuda" else BATCH)
    context = EvaluationContext(
        pipe, judge, icons, sample_store, settings.split, settings.limit, settings.sampling, settings.scenes
    )
    say = sample_store.state.on_main_process(partial(print, file=sys.stderr, flush=True))
    chosen = [name for name in PARTS if name in settings.only or not settings.only]
    found: list[Part] = []
    left_out: dict[str, str] = {}
    for number, name in enumerate(chosen, 1):
        say(f"part {number} of {len(chosen)}: {name}")
        try:
            found.append(PARTS[name](context))
        except UnsupportedPart as reason:
            if name in settings.only:
                raise
            left_out[name] = str(reason)
            say(f"left out: {reason}")
    if not sample_store.state.is_main_process:
        return ()
    protocol = drawn | {
        "model": settings.model,
        "judge": {"is": str(settings.judge or settings.split), "fingerprint": judge.fingerprint},
        "limit": settings.limit,
        "scenes": settings.scenes,
        "left_out": left_out,
        "seeds": f"image n of each kind has the seed {settings.seed} + n, in its later turns {TURN} more each time",
        "resize": "the judge sees 64 px images as drawn, in 8 bits; low-resolution renders are area means of larger ones",
        "names": len(icons.recognisable),
        "intervals": "95%: percentile bootstrap over prompts, 1000 resamples; distances between sets: delete-a-group jackknife",
    }
    return write(settings.out, command, protocol, _summary(settings, found), found, time.monotonic() - began)


def _protocol_of_images(settings: Settings, pipe: UnCLIPPipeline) -> dict[str, Any]:
    """Everything that determines the images: if one of these changes, it is another evaluation."""
    folder, data = resolve(settings.model), Path(settings.data) / "icons.json.gz"
    distilled = settings.sampling.get("sampler") == "distilled"
    left_out = {"model_index.json"} if distilled else {"model_index.json", DISTILLED_FILE}  # `sampling` below covers the first
    files: dict[str, list[Path]] = {"weights": [], **{key: [] for key in DEPENDENCES}}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json") and p.name not in left_out):
        component = path.relative_to(folder).parts[0]
        key = next((key for key, found in DEPENDENCES.items() if component in found.components), "weights")
        files[key].append(path)
    return {
        "version": __version__,
        **{key: _hash(paths) for key, paths in files.items()},
        "data": _hash([data]) if data.is_file() else str(settings.data),
        "split": settings.split,
        "seed": settings.seed,
        "sampling": pipe.sampling_settings(settings.sampling),
        "dtype": str(pipe.decoder.dtype).removeprefix("torch."),
    }


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _check_folder(settings: Settings) -> None:
    """Raises ValueError, before anything is loaded, if `out` holds something that is no evaluation."""
    out = settings.out
    if out.exists() and not (out.is_dir() and (settings.force or (out / DRAWN_WITH).is_file() or not any(out.iterdir()))):
        hint = ", or pass --force to write into it" if out.is_dir() else ""
        raise ValueError(f"{out} exists and is no evaluation; choose another folder{hint}")


def _open(settings: Settings, drawn: dict[str, Any], batch: int = BATCH) -> SampleStore:
    """The image store of a new or the same evaluation. Raises ValueError, naming the difference, for another one."""
    out, sample_store = settings.out, SampleStore(settings.out / "pictures", settings.seed, batch)
    recorded, state = out / DRAWN_WITH, sample_store.state
    restart = settings.force and recorded.is_file()  # only an evaluation's own images may be deleted
    before = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() and not restart else drawn
    changed = [key for key, value in drawn.items() if before.get(key) != value]
    for key in changed:
        if key not in DEPENDENCES:
            found = f"{out} holds an evaluation with another {key} ({before.get(key)}, now {drawn[key]})"
            raise ValueError(f"{found}; choose another folder, or pass --force to draw anew")
    state.wait_for_everyone()  # until all processes have read the file
    if state.is_main_process:
        if restart:
            sample_store.delete()
        for key in changed:
            sample_store.delete(DEPENDENCES[key].affects)
            print(DEPENDENCES[key].message, file=sys.stderr)
        try:
            out.mkdir(parents=True, exist_ok=True)
            recorded.write_text(json.dumps(drawn, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    state.wait_for_everyone()
    return sample_store


def _summary(settings: Settings, found: list[Part]) -> Table:
    """The project's targets and where this model stands."""
    weights = sum(p.stat().st_size for p in resolve(settings.model).rglob("*.safetensors")) / 1e6
    note = f"split {settings.split}" + (
        f"; a quick look: at most {settings.limit} images of each kind" if settings.limit else ""
    )
    return summary({part.name: part.results for part in found}, settings.model, note, weights)
