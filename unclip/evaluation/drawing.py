"""Pictures on disk: drawn in batches, each with its own seed, and drawn once, however often the work is interrupted."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..io.checkpoints import write_beside
from ..runtime.processes import together

BATCH = 16
GPU_BATCH = 128

# (prompts' numbers, their generators) -> pictures [B, 3, H, W] in [0, 1]
Draw = Callable[[Sequence[int], list[torch.Generator]], Tensor]


class Gallery:
    """Folders of numbered PNGs under `folder`. What is there is not drawn again; a batch is drawn whole or not at all.

    Batches begin at multiples of `batch`, so that a picture's neighbours, and with them its last bits, are the same in an
    evaluation that was interrupted. Pictures are read back from their files in either case.

    Of several processes that were started together each draws every n-th batch, and all of them read what all have drawn.
    """

    def __init__(self, folder: Path, seed: int = 0, batch: int = BATCH):
        self.folder, self.seed, self.batch, self.state = folder, seed, batch, together()

    def pictures(self, name: str, count: int, draw: Draw, batch: int | None = None, first: int = 0) -> Tensor:
        """`count` pictures called `name`, uint8 [N, 3, H, W]; picture n has the seed `seed + first + n`."""
        folder, size = self.folder / name, batch or self.batch
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{n:05d}.png" for n in range(count)]
        chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
        mine = chunks[self.state.process_index :: self.state.num_processes]
        quiet = not self.state.is_main_process or all(f.is_file() for f in files)
        bar = tqdm(total=sum(map(len, mine)), desc=name, unit="picture", file=sys.stderr, disable=quiet)
        for chunk in mine:
            if not all(files[n].is_file() for n in chunk):
                generators = [torch.Generator().manual_seed(self.seed + first + n) for n in chunk]
                drawn = (draw(chunk, generators).float().cpu().clamp(0, 1) * 255).round().byte()
                for n, picture in zip(chunk, drawn, strict=True):
                    _write(files[n], picture)
            bar.update(len(chunk))
        bar.close()
        self.state.wait_for_everyone()
        return read(files)

    def forget(self, which: Callable[[str], bool] = lambda name: True) -> None:
        """Delete all pictures, or those whose name is one of `which`."""
        for folder in self.folder.glob("*"):
            if which(folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, picture: Tensor) -> None:
    write_beside(path, lambda partial: Image.fromarray(picture.permute(1, 2, 0).numpy()).save(partial, "PNG"))


def read(files: Sequence[Path]) -> Tensor:
    """Pictures of one size, uint8 [N, 3, H, W]. Raises ValueError, naming the file, for one that is damaged."""
    pictures = []
    for path in files:
        try:
            with Image.open(path) as file:
                pictures.append(np.asarray(file.convert("RGB")))
        except OSError as error:
            raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); delete it to have it drawn again") from None
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
