"""Train the evaluation's style judge: `python benchmarks/style_judge.py [--data DIR] [--out FILE]`.

On real renders of all recognisable icons whose concept is not held out, in every style; then it reads those whose concept is
held out, as they are and under damage. Takes some minutes on one core.
"""

import argparse
from pathlib import Path

import torch

from unclip.data.distort import DISTORTIONS
from unclip.data.icon_packages import STYLES
from unclip.data.icons import IconSet
from unclip.data.judged import distorted_icons, icon_rows
from unclip.data.plans import split_of_concept
from unclip.evaluation.poses import in_pose
from unclip.evaluation.style_judge import FILE, StyleJudge, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--views", type=int, default=4, help="damaged versions of each render")
    parser.add_argument("--updates", type=int, default=1500)
    options = parser.parse_args()
    icons = IconSet.load(options.data)
    rows = {"train": [], "held out": []}
    for row in icon_rows(icons):
        rows["train" if split_of_concept(icons.icons[row]["concept"]) == "train" else "held out"].append(row)
    styles = {name: torch.tensor([STYLES.index(icons.icons[row]["style"]) for row in some]) for name, some in rows.items()}
    train(in_pose(icons, rows["train"]), styles["train"], options.views, options.updates).save(options.out)
    judge = StyleJudge.load(options.out)
    print("| renders | read rightly |\n|---|---|")
    for kind in (None, *DISTORTIONS):
        right = judge.read(distorted_icons(icons, rows["held out"], kind, seed=3)) == styles["held out"]
        print(f"| held-out concepts, {kind or 'clean'} ({len(right)}) | {100 * right.float().mean().item():.1f}% |", flush=True)


if __name__ == "__main__":
    main()
