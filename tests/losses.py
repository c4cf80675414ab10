"""Loss curves of 20 steps of every configuration in `configs/tiny`, as they were when they were last meant to change.

`PYTHONPATH=. python tests/losses.py` trains them again and writes the curves to `tests/golden/losses.json`.
"""

import json
import tempfile
from pathlib import Path

import torch
from conftest import ROOT
from running import run_here

from unclip.runtime.config import load_config

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
STEPS = 20
# In the order in which one is trained on top of another. Batches of one where a step takes long; the prior's loss moves by
# less than 1e-3 when the learning rate of its configuration, 1e-3, is 1% higher: four times that rate.
STAGES = {
    "clip": (),
    "decoder": (),
    "judge": (),
    "prior": ("learning_rate=4e-3",),
    "prior_autoregressive": (),
    "text_proj": (),
    "draft": (),
    "layout": (),
    "decoder_distill": ("batch_size=1",),
    "upsampler_256": (),
    "upsampler_1024": ("batch_size=1",),
}
UNCONDITIONED = ("clip", "judge", "upsampler_256", "upsampler_1024")


def curve(stage: str, folder: Path, base: Path, rate: float = 1.0) -> list[float]:
    """Train a stage in `folder`, on top of the CLIP and the decoder in `base`; -> the loss of each of its steps.

    `rate` multiplies the learning rate.
    """
    config = load_config(ROOT / f"configs/tiny/{stage}.yaml", list(STAGES[stage]))
    words = [*STAGES[stage], f"max_steps={STEPS}", f"learning_rate={rate * config['learning_rate']}"]
    if stage not in UNCONDITIONED:
        words.append(f"objective.clip={base / 'clip'}")
    if stage == "decoder_distill":
        words.append(f"init_from={base / 'decoder'}")
    run_here(stage, folder, *words)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        found = {s: curve(s, Path(place) / s, Path(place)) for s in STAGES}
    GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {v}" for k, v in found.items()) + "\n}\n")
    print(GOLDEN)


if __name__ == "__main__":
    main()
