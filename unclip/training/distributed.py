"""The processes that train together: device, precision, sharding, and what they agree on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from ..runtime.config import ConfigError
from ..runtime.precision import best_device, fast_dtype
from ..runtime.processes import PATIENCE, settle
from .config import TrainConfig
from .sharding import launched


class Distributed:
    """This process among those of a run. Methods that communicate are for all processes to call together."""

    def __init__(self, config: TrainConfig):
        """Join the other processes. Raises ConfigError for a precision or sharding that cannot be had here."""
        self.precision = config.precision
        if self.precision == "auto":
            self.precision = "bf16" if fast_dtype() == torch.bfloat16 else "no"
        of_launcher = launched()
        folder = Path(config.output_dir)
        self.accelerator = Accelerator(
            cpu=best_device().type == "cpu",  # Accelerate does not look for other processes on a CPU by itself
            mixed_precision=self.precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with=config.trackers or None,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "trackers")),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self.rank: int = self.accelerator.process_index
        self.processes: int = self.accelerator.num_processes
        if self.precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("precision fp16 needs a GPU: choose bf16 or no")
        self.report(f"processes: {self.processes}, device: {self.device.type}, dtype: {self.precision}")
        self.sharding = self._sharding(of_launcher if config.sharding == "none" else config.sharding, config)

    def _sharding(self, sharding: str, config: TrainConfig) -> str | None:
        """The ZeRO stage, or None. Raises ConfigError for what does not work with sharding."""
        if sharding == "none":
            return None
        if self.processes == 1:
            raise ConfigError(f"sharding {sharding} needs several processes: start with torchrun or accelerate launch")
        if self.precision == "fp16":
            raise ConfigError(f"sharding {sharding} does not go with precision fp16: choose bf16 or no")
        if config.compile:
            raise ConfigError(f"sharding {sharding} does not go with compile=true")
        if config.optimizer == "muon":
            raise ConfigError(f"sharding {sharding} does not go with optimizer muon, which needs whole matrices: choose adamw")
        return sharding

    def samples_per_step(self, config: TrainConfig) -> int:
        """Examples of one optimizer step, over all processes and accumulated passes."""
        return config.batch_size * config.gradient_accumulation * self.processes

    def report(self, text: str) -> None:
        """Print a line to stderr, on the main process, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def any(self, *flags: Any) -> list[bool]:
        """Each flag, true on every process when it is on any."""
        if self.processes == 1:
            return [bool(f) for f in flags]
        raised = torch.tensor([float(bool(f)) for f in flags], device=self.device)
        return (self.accelerator.reduce(raised, "sum") > 0).tolist()

    def gather(self, values: list[float]) -> list[list[float]]:
        """The `values` of every process, one row each."""
        return self.accelerator.gather(torch.tensor([values], device=self.device)).tolist()

    def broadcast(self, value: Any) -> Any:
        """The main process's `value`."""
        return broadcast_object_list([value])[0]

    def run_on_main(self, action: Callable[[], None]) -> None:
        """Run an action on files on the main process. A file that it could not write ends every process."""
        failure = None
        if self.is_main:
            try:
                action()
            except (OSError, SafetensorError) as error:
                failure = error
        if any(self.any(failure is not None)):
            raise failure or SystemExit(1)

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The objective and the optimizer under autocast, gradient synchronisation and, for fp16, loss scaling."""
        if self.sharding:
            wrapped = self.accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)  # no DDP
            return wrapped, self.accelerator.prepare(optimizer)
        return self.accelerator.prepare(objective, optimizer)

    def end(self) -> None:
        """Wait for every process and close the trackers."""
        settle(self.accelerator.state)
        self.accelerator.end_training()
