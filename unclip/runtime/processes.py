"""The processes that `accelerate launch` or torchrun started together."""

import time
from datetime import timedelta

from accelerate import PartialState

from .precision import best_device

PATIENCE = timedelta(hours=2)  # for one that validates, draws or saves while the others wait; NCCL's own is ten minutes


def together() -> PartialState:
    """This process's place among them; one that was started alone is the main process of one."""
    return PartialState(cpu=best_device().type == "cpu", timeout=PATIENCE)  # it would not look for others on a CPU by itself


def own_device(state: PartialState) -> str | None:
    """Where one of several works; None for one that was started alone, which is free to choose."""
    return str(state.device) if state.num_processes > 1 else None


def settle(state: PartialState) -> None:
    """Wait until every process is here and may drop its process group."""
    state.wait_for_everyone()
    if state.num_processes > 1:
        # gloo's threads need Python to let go of the barrier's tensors; whoever drops the process group before that, waits
        # for them while it holds Python, for ever
        time.sleep(0.5)


def leave(state: PartialState) -> None:
    """End working together, when every process is ready to."""
    settle(state)
    state.destroy_process_group()
