"""The processes that `accelerate launch` or torchrun started together."""

import time
from datetime import timedelta

from accelerate import PartialState

from .precision import best_device

PATIENCE = timedelta(hours=2)  # while one validates, samples or saves and the others wait; NCCL's default is ten minutes


def together() -> PartialState:
    """The state of this process among them; one that was started alone is the main process of one."""
    return PartialState(
        cpu=best_device().type == "cpu", timeout=PATIENCE
    )  # by default it would ignore other processes on a CPU


def own_device(state: PartialState) -> str | None:
    """The device of one of several processes; None for one that was started alone."""
    return str(state.device) if state.num_processes > 1 else None


def settle(state: PartialState) -> None:
    """Wait until every process can destroy its process group."""
    state.wait_for_everyone()
    if state.num_processes > 1:
        # gloo's threads need the GIL to release the barrier's tensors: destroying the process group before that waits for
        # them while it holds the GIL, a deadlock
        time.sleep(0.5)


def leave(state: PartialState) -> None:
    """Destroy the process group, when every process can."""
    settle(state)
    state.destroy_process_group()
