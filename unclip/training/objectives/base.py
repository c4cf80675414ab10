"""The contract between the one training loop and what it trains."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ... import networks
from ...io.checkpoints import save_components
from ...runtime.compiling import forget_broken
from ...runtime.config import ConfigError


class Objective(nn.Module):
    """Networks and a loss. The loop calls `forward` on collated `examples` and optimises `trained`.

    `trained` holds what is optimised, averaged and saved; frozen helpers (a CLIP, say) live outside it. `forward` is
    `to_tensors`, which is the host's work, and `compute_loss`, which is the device's, and during which nothing may be read
    from it: no `.item()`, no boolean index, no shape that depends on values.
    """

    examples: Dataset
    validation: Dataset | None = None  # examples that are held out, for the stages that look at some
    trained: nn.ModuleDict
    optional_init: tuple[str, ...] = ()  # networks of `trained` that `init_from` need not hold
    held_to_start = False  # whether a resumed run needs the weights that it once started from
    lora: Any = None  # the settings of an adapter, where one is trained in the networks' place
    shardable = True  # whether its networks may be in parts over the processes
    shards_blocks = True  # whether a sharded block may be gathered for its own call alone
    compiled = False  # whether `compute_loss` is

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch and scalars to log; NaN is a mean of nothing."""
        return self.compute_loss(self.to_tensors(batch))

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A collated batch as `compute_loss` takes it: tensors alone, texts tokenised."""
        return batch

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` answers, of a batch of tensors."""
        raise NotImplementedError

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are optimised, by their names in `trained`."""
        return {n: p for n, p in self.trained.named_parameters() if p.requires_grad}

    def parameter_groups(self) -> Iterator[tuple[dict[str, nn.Parameter], float]]:
        """Named trainable parameters with the factor on the learning rate that they take."""
        yield self.trained_parameters(), 1.0

    def prepare(self, device: torch.device | str = "cpu", progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Whatever needs data and must happen once, before the first step of a fresh run; what is costly of it on `device`."""

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that network `name` starts from, given those that `init_from` holds."""
        return state

    def adapt(self) -> None:
        """Put the adapter on, where there is one: after the networks have their starting weights."""

    def checkpoint_activations(self) -> None:
        """Keep few activations for the backward pass and compute the others again. Raises ConfigError where none can."""
        able = [networks.recompute_activations(network) for network in self.trained.children()]
        if not any(able):
            raise ConfigError(f"gradient_checkpointing: no network of this stage can, of {', '.join(self.trained)}")

    def compile_networks(self) -> None:
        """Compile the loss with the networks in it. Raises ConfigError for a stage that cannot be compiled."""
        forget_broken()
        self.compute_loss = torch.compile(self.compute_loss, dynamic=False)
        self.compiled = True

    @property
    def fixes_lengths(self) -> bool:
        """Whether texts are padded to one length for all batches: for each a compiler would start anew, and so may a GPU's
        allocator. A CPU is spared the padding."""
        return self.compiled or next(self.trained.parameters()).device.type != "cpu"

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out metrics of the present weights."""
        return {}

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """A picture of what the present weights do, always on the same inputs."""
        return None

    def _held_out(self, count: int) -> dict[str, Any]:
        """The first `count` held-out examples as `compute_loss` takes them, where the networks are."""
        batch = default_collate([self.validation[i] for i in range(count)])
        return self.to_tensors(to_device(batch, next(self.trained.parameters()).device))

    def components(self) -> dict[str, Any]:
        """The trained networks and what belongs to them, by their names in a pipeline."""
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        """The present weights for a pipeline: its components."""
        save_components(folder, self.components())


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`batch` with its tensors on `device`; but `index` stays on the CPU, where the examples' own generators are."""
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor) and k != "index"}
    return batch | moved


def grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Pictures [B, 3, H, W] in [0, 1] as one sheet."""
    images = images.detach().float().cpu().clamp(0, 1)
    missing = -len(images) % columns
    images = torch.cat([images, torch.ones(missing, *images.shape[1:])])
    rows = [torch.cat(list(row), -1) for row in images.split(columns)]
    pixels = (torch.cat(rows, -2) * 255).round().byte().permute(1, 2, 0).numpy()
    sheet = Image.fromarray(pixels)
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST) if scale > 1 else sheet
