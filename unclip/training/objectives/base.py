"""The contract between the trainer and what it trains."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from ... import networks
from ...io.checkpoints import save_components
from ...io.pixels import float_to_uint8
from ...runtime.compiling import forget_broken
from ...runtime.config import ConfigError


class Objective(nn.Module):
    """Networks and a loss. The trainer calls `forward` on collated `examples` and optimises `trained`.

    `trained` holds what is optimised, averaged and saved; frozen networks (a CLIP, say) are attributes beside it. `forward`
    is `to_tensors`, which is the host's work, and `compute_loss`, which is the device's: in it nothing is read from the
    device (no `.item()`, no boolean index, no shape that depends on values).

    Whatever a constructor reads beside its arguments comes from a `load_...` method, which `unclip plan` overrides.
    """

    examples: Any  # a Dataset, of whatever kind the stage needs
    validation: Any = None  # held-out examples, for the stages that validate on some
    trained: nn.ModuleDict
    optional_init: tuple[str, ...] = ()  # networks of `trained` that `init_from` need not hold
    held_to_start: bool = False  # whether a resumed run needs the weights that it once started from
    lora: Any = None  # the settings of an adapter, where one is trained in the networks' place
    shardable: bool = True  # whether its networks may be sharded over the processes
    shards_blocks: bool = True  # whether a sharded block may be gathered for its own call alone
    compiled: bool = False  # whether `compute_loss` is
    vocabulary_of_data: bool = False  # whether the networks' sizes depend on the dataset

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch and scalars to log; NaN is a mean of nothing."""
        return self.compute_loss(self.to_tensors(batch))

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A collated batch as `compute_loss` takes it: tensors alone, texts tokenised."""
        return batch

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward` of a batch of tensors."""
        raise NotImplementedError

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        """A batch of `size` examples as `compute_loss` takes it, of the largest shapes that training has, on the CPU."""
        raise NotImplementedError

    def dummy_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a `dummy_batch`, computed without reading a value: what `unclip plan` counts."""
        return self.compute_loss(batch)[0]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are optimised, by their names in `trained`."""
        return {n: p for n, p in self.trained.named_parameters() if p.requires_grad}

    def parameter_groups(self) -> Iterator[tuple[dict[str, nn.Parameter], float]]:
        """Named trainable parameters with the factor on their learning rate."""
        yield self.trained_parameters(), 1.0

    def prepare(self, device: torch.device | str = "cpu", progress: Callable[[Iterable], Iterable] = iter) -> None:
        """What needs data and must happen once, before the first step of a new run; its costly part on `device`."""

    def starting_weights(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that network `name` starts from, given those that `init_from` holds."""
        return state

    def adapt(self) -> None:
        """Called once the networks have their starting weights: puts the adapter on, where there is one."""
        self.add_adapter()

    def add_adapter(self) -> None:
        """Put the adapter on, where there is one."""

    def checkpoint_activations(self) -> None:
        """Keep few activations for the backward pass and recompute the others. Raises ConfigError where no network can."""
        able = [networks.recompute_activations(network) for network in self.trained.children()]
        if not any(able):
            raise ConfigError(f"gradient_checkpointing: no network of this stage can, of {', '.join(self.trained)}")

    def compile_networks(self) -> None:
        """Compile the loss with the networks in it. Raises ConfigError for a stage that cannot be compiled."""
        forget_broken()
        self.compute_loss = torch.compile(self.compute_loss, dynamic=False)  # type: ignore[method-assign]  # of this objective only
        self.compiled = True

    @property
    def fixes_lengths(self) -> bool:
        """Whether texts are padded to one length for all batches: every other length would be compiled again, and a GPU's
        allocator may need new blocks for it. On a CPU there is less padding."""
        return self.compiled or next(self.trained.parameters()).device.type != "cpu"

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out metrics of the present weights."""
        return {}

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """Sample images of the present weights, always from the same inputs."""
        return None

    def held_out_batch(self, count: int) -> dict[str, Tensor]:
        """The first `count` held-out examples as `compute_loss` takes them, on the networks' device."""
        batch = default_collate([self.validation[i] for i in range(count)])
        return self.to_tensors(to_device(batch, next(self.trained.parameters()).device))

    def components(self) -> dict[str, Any]:
        """The trained networks and what belongs to them, by their names in a pipeline."""
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        """Write the present weights for a pipeline: its components."""
        save_components(folder, self.components())


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`batch` with its tensors on `device`; but `index` stays on the CPU, where the examples' own generators are."""
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor) and k != "index"}
    return batch | moved


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of `values` where `counted`, 0 of none."""
    return (values * counted).sum() / counted.sum().clamp_min(1)


def grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Images [B, 3, H, W] in [0, 1] as one sheet of `columns`, enlarged `scale` times."""
    images = images.detach().float().cpu().clamp(0, 1)
    missing = -len(images) % columns
    images = torch.cat([images, torch.ones(missing, *images.shape[1:])])
    rows = [torch.cat(list(row), -1) for row in images.split(columns)]
    pixels = float_to_uint8(torch.cat(rows, -2)).permute(1, 2, 0).numpy()
    sheet = Image.fromarray(pixels)
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST) if scale > 1 else sheet
