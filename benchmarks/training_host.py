"""Host time of a training step, by cause: time that a GPU, however fast, would wait for.

What the host does by itself is timed, on a batch of the size that is asked for: taking it from the data workers, tokenising,
drawing noise. What it only asks the device for is counted, operation by operation, in a step of two examples on the CPU, with
bfloat16 autocast, AdamW's fused kernel, texts of one length and attention in one kernel, and priced at `LAUNCH` each. (The
meta device would compute nothing, but much of it is Python, at a hundred times a launch.) The stage's CLIP is the shipped one.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from unclip.data.examples import seeded_noise
from unclip.runtime.attention import install
from unclip.runtime.config import load_config
from unclip.runtime.operations import Operations
from unclip.training.ema import PowerEMA
from unclip.training.muon import Muon, hidden_matrices
from unclip.training.objectives import Objective, create

LAUNCH = 6e-6  # seconds: on an H100's host 4,960 operations of Muon took 25 to 35 ms, and 2,200 of both passes 15 to 20
DATA, TEXTS, NOISE = "batch from the data workers", "texts and icons", "noise"


class Step:
    """A training step of a stage on the CPU."""

    def __init__(self, config: dict[str, Any]):
        torch.manual_seed(0)
        self.objective = create(config["stage"], {k: config.get(k) or {} for k in ("model", "data", "objective")}, 0)
        self.objective.adapt()
        self.objective.train().compiled = True  # texts of one length, as on a GPU
        for network in self.objective.trained.children():
            install(network.to(memory_format=torch.channels_last), "sdpa")
        self.parameters = {n: p for n, p in self.objective.trained.named_parameters() if p.requires_grad}
        hidden = set(hidden_matrices(self.objective.trained)) if config.get("optimizer") == "muon" else set()
        groups = [{"params": [p for n, p in self.parameters.items() if (n in hidden) == m], "muon": m} for m in (False, True)]
        self.optimizer = Muon([g for g in groups if g["params"]], torch.bfloat16, lr=1e-3, fused=True)
        self.average = PowerEMA(self.parameters, 0.1)
        self.noise: list[torch.Size] = []  # the shapes of the rows of what is drawn in a step
        for part in self.objective.modules():  # the distillation's objective holds the decoder's
            for kind in type(part).__mro__ if isinstance(part, Objective) else ():  # wherever the stage gets its noise from
                module = sys.modules[kind.__module__]
                if hasattr(module, "seeded_noise"):
                    module.seeded_noise = self._drawn

    def _drawn(self, seed: int, indices: Tensor, like: Tensor) -> Tensor:
        self.noise.append(like.shape[1:])
        return torch.zeros_like(like)

    def take(self, batch: dict[str, Any], count: bool = True) -> dict[str, Operations]:
        """A step of a batch on the CPU; -> what it dispatches, by cause."""
        operations = {}

        def of(cause: str, work: Callable[[], Any]) -> Any:
            operations[cause] = Operations("cpu")
            with operations[cause] if count else nullcontext():
                return work()

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.objective.compute_loss(batch)[0]

        self.noise.clear()
        batch, parameters = self.objective.to_tensors(batch), list(self.parameters.values())
        loss = of("forward", forward)
        of("backward", loss.backward)
        of("gradient norm", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        of("optimiser", self.optimizer.step)
        of("average", lambda: self.average.update(self.parameters, 2))
        self.optimizer.zero_grad()
        return operations


def report(name: str, settings: list[str], size: int, rounds: int) -> None:
    """Print the table of a stage's configuration with `settings` changed, medians of `rounds` batches of `size` examples."""
    step = Step(load_config(name, ["objective.clip=emoji", *settings]))
    few = default_collate([step.objective.examples[n] for n in range(2)])
    step.take(few, count=False)  # the optimiser's state is made in the first step
    counted = step.take(few)
    shapes = list(step.noise)

    taken, making = defaultdict(list), time.perf_counter()
    loader = DataLoader(
        step.objective.examples, size, sampler=range(size * (rounds + 1)), num_workers=1, prefetch_factor=rounds + 1
    )
    batches = iter(loader)
    first = next(batches)
    making = (time.perf_counter() - making) / size
    step.objective.to_tensors(first)
    time.sleep(making * size * rounds)  # so that the worker is not waited for
    for _ in range(rounds):
        start = time.perf_counter()
        batch = next(batches)
        taken[DATA].append(time.perf_counter() - start)
        step.objective.to_tensors(batch)  # the icons' embeddings are kept
        start = time.perf_counter()
        step.objective.to_tensors(batch)
        taken[TEXTS].append(time.perf_counter() - start)
        start = time.perf_counter()
        for shape in shapes:
            seeded_noise(0, batch["index"], torch.empty(size, *shape))
        taken[NOISE].append(time.perf_counter() - start)

    print(f"{name} {' '.join(settings)}: batch {size}, medians of {rounds} rounds\n")
    print("| cause | ms a step | operations |\n|---|---|---|")
    total, numbers = 0.0, {cause: sum(found.operations.values()) for cause, found in counted.items()}
    for cause in (DATA, TEXTS, NOISE, *numbers):
        seconds = statistics.median(taken[cause]) if cause in taken else LAUNCH * numbers[cause]
        total += seconds
        print(f"| {cause} | {1000 * seconds:.1f} | {numbers.get(cause, '')} |")
    print(f"| all | {1000 * total:.1f} | {sum(numbers.values())} |")
    print(f"\nA data worker makes {1 / making:.0f} examples a second.")
    for cause, found in counted.items():
        for read in found.host_reads:
            print(f"The host would wait for a GPU in {cause}: {read}")
