"""`unclip generate --prompts`: samples a file of prompts with one or several processes, resumable."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from .images import check_free, save, slug, write

MANIFEST = "manifest.jsonl"


def read_prompts(source: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises ValueError for a file that is missing, blank or not text."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{source} is no text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{source} holds no prompts: one a line is expected")
    return prompts


def sample_all(
    jobs: list[tuple[str, int]],
    out: Path,
    facts: dict[str, str],
    sample: Callable[[list[tuple[str, int]], object], list],
    prepare: Callable[[str | None], tuple[object, int]],
    force: bool,
) -> None:
    """Sample the jobs (prompt, seed) whose images `out` lacks, and list all in a manifest.

    Images are written atomically with their job as metadata, by which existing ones are recognised. Under
    `accelerate launch` or `torchrun` each process samples every n-th job.

    Args:
        jobs: All jobs.
        out: The folder.
        facts: Metadata of every image.
        sample: `sample(jobs, pipe)` samples the images of some jobs.
        prepare: `prepare(device)` loads the pipeline and gives its batch size.
        force: Replace images of other jobs.

    Raises:
        ValueError: without `force`, for an image of another job in a job's place.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from ..runtime.processes import leave, own_device, together

    rows = [
        {"file": f"{number:06d}-{slug(prompt)}.png", "prompt": prompt, "seed": str(seed)}
        for number, (prompt, seed) in enumerate(jobs)
    ]
    check_free([out / MANIFEST], force=True)
    state = together()
    numbers = range(state.process_index, len(jobs), state.num_processes)
    mine = [n for n in numbers if not _is_there(out / rows[n]["file"], rows[n] | facts, force)]
    kept = sum(gather_object([len(numbers) - len(mine)]))
    if state.is_main_process and kept:
        print(f"{kept} of {len(jobs)} images are there already", file=sys.stderr)
    if mine:
        pipe, batch = prepare(own_device(state))
        bar = tqdm(total=len(mine), desc="images", file=sys.stderr, disable=not state.is_main_process)
        for chunk in (mine[n : n + batch] for n in range(0, len(mine), batch)):
            for number, image in zip(chunk, sample([jobs[n] for n in chunk], pipe), strict=True):
                save(image, out / rows[number]["file"], _metadata(rows[number] | facts))
                bar.update()
        bar.close()
    state.wait_for_everyone()
    if state.is_main_process:
        missing = [row["file"] for row in rows if not (out / row["file"]).is_file()]
        if missing:
            raise ValueError(f"{len(missing)} images are missing, {missing[0]} the first; the same command draws them")
        lines = "".join(json.dumps(row | facts, ensure_ascii=False) + "\n" for row in rows)
        write(out / MANIFEST, lambda path: path.write_text(lines, encoding="utf-8"))
        for row in rows:
            print(out / row["file"])
    leave(state)


def _metadata(row: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in row.items() if k != "file"}


def _is_there(path: Path, row: dict[str, str], force: bool) -> bool:
    """Whether a job's image exists, can be read and is of this job."""
    from PIL import Image

    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            found = dict(image.text)  # type: ignore[attr-defined] # PNG has it, other formats raise AttributeError
    except (OSError, SyntaxError, AttributeError) as error:
        if force:
            return False
        raise ValueError(f"{path} is no complete image ({error}); pass --force to replace it") from None
    wrong = [k for k, v in _metadata(row).items() if found.get(k) != v]
    if wrong and not force:
        raise ValueError(
            f"{path} was made with another {wrong[0]} ({found.get(wrong[0])!r}, now {row[wrong[0]]!r}); "
            "pass --force to replace it, or another --out"
        )
    return not wrong
