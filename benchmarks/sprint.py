"""A training run of a few minutes on a GPU, from inputs that were packed before.

python benchmarks/sprint.py --pack out/sprint --part 1      # and 2, 3: the inputs
python benchmarks/sprint.py --minutes 7 --out out/trained   # trains from out/sprint, on a machine that may have no dataset
python benchmarks/sprint.py --merge out/trained runs/sprint # a folder of components, which `unclip export` takes

It ends on time, imports and compilation counted in, and leaves at most 7 files of weights and a log (docs/gpu_sprint.md).
"""

import argparse
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import zipfile
from pathlib import Path

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
STAGES = ("decoder", "prior", "draft")
ON_TIME, FAILED, LATE = 0, 1, 3  # exit codes


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="how long to train, start to end")
    parser.add_argument("--out", type=Path, help="folder of the weights and the log")
    parser.add_argument("--stage", choices=STAGES, default="decoder")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights")
    parser.add_argument("--tiny", action="store_true", help="toy networks on plain shapes: the same code on a CPU")
    parser.add_argument("--inputs", type=Path, help="folder of the packed parts; default: out/sprint")
    parser.add_argument("--batch", type=int, help="examples of a step")
    parser.add_argument("--rate", type=float, help="learning rate; default: the configuration's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="make the inputs")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), default=1, help="of the inputs")
    parser.add_argument("--model", help="that is packed or merged for; default: what the configuration starts from, else emoji")
    parser.add_argument("--bank", type=Path, help="of plans, as `unclip data bank` makes it; default: it is made")
    parser.add_argument("--plans", type=int, help="of a bank that is made; default: 1,000,000, with --tiny 2,000")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the other machine lacks")
    parser.add_argument("--merge", type=Path, nargs=2, metavar=("DIR", "OUT"), help="make a folder of components of the files")
    found = parser.parse_args(given)
    if not (found.pack or found.merge) and not (found.minutes and found.minutes > 0 and found.out):
        parser.error("one of --pack DIR, --merge DIR OUT, or --minutes M --out DIR is needed, M above 0")
    if found.inputs is None:
        found.inputs = Path("out/sprint_tiny", found.stage) if found.tiny else Path("out/sprint")
    return found


def use_wheels(inputs: Path) -> None:
    """Let Python import this clone and, where it was not installed, what is in the packed wheels."""
    sys.path.insert(0, str(ROOT))
    site = inputs / "site"
    for wheel in sorted(inputs.glob("part-*/wheels/*.whl")):
        if not (site / f"{wheel.name}.done").exists():
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(site)
            (site / f"{wheel.name}.done").touch()
    sys.path.append(str(site))  # what is installed comes first


def watch(deadline: float, out: Path) -> None:
    """End the process at `deadline` whatever it is doing; what was saved last stays."""

    def wait() -> None:
        time.sleep(max(deadline - time.monotonic(), 0))
        shutil.rmtree(out / ".partial", ignore_errors=True)
        found = len(list(out.glob("shard-*.safetensors")))
        print(f"out of time: ended by the watchdog; {out} holds {found} files of weights", flush=True)
        os._exit(LATE)

    threading.Thread(target=wait, daemon=True).start()


def run(options: argparse.Namespace) -> int:
    """Train; -> the exit code."""
    deadline = STARTED + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    watch(deadline, options.out)
    sprint = None
    try:
        if options.tiny and not list(options.inputs.glob("part-*")):
            use_wheels(options.inputs)
            pack_all(options)
        use_wheels(options.inputs)
        from sprint_train import Sprint

        sprint = Sprint(options, STARTED, deadline)
        signal.signal(signal.SIGTERM, lambda *_: sprint.stop())
        sprint.set_up()
        sprint.train()
    except BaseException:
        traceback.print_exc()
        if sprint is not None:
            sprint.save_after_failure()
        return FAILED
    return ON_TIME


def pack_all(options: argparse.Namespace) -> None:
    from sprint_pack import PARTS, pack

    for part in range(1, PARTS + 1):
        pack(argparse.Namespace(**vars(options) | {"pack": options.inputs, "part": part}))


def main() -> None:
    options = arguments()
    if options.pack or options.merge:
        sys.path.insert(0, str(ROOT))
        if options.pack:
            from sprint_pack import pack

            pack(options)
        else:
            from sprint_shards import merge

            merge(*options.merge, options.model)
        return
    code = run(options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # compilers' processes and a device that hangs are not waited for


if __name__ == "__main__":
    main()
