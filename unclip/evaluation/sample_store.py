"""Sampled images on disk: each has its own seed and is sampled once, however often the evaluation is interrupted."""

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
from ..io.images import save_image
from ..io.pixels import float_to_uint8
from ..runtime.processes import together

BATCH = 16
GPU_BATCH = 128

# (numbers of prompts, their generators) -> images [B, 3, H, W] in [0, 1]
BatchSampler = Callable[[Sequence[int], list[torch.Generator]], Tensor]


class SampleStore:
    """Folders of numbered PNGs under `folder`. Existing images are not sampled again, unless their batch is incomplete.

    Batches begin at multiples of `batch`, so that an image's batch, and with it its last bits, is the same in an evaluation
    that was interrupted. All images are read back from their files.

    Of several processes that were started together each samples every n-th batch, and all of them read all images.
    """

    def __init__(self, folder: Path, seed: int = 0, batch: int = BATCH):
        self.folder, self.seed, self.batch, self.state = folder, seed, batch, together()

    def images(self, name: str, count: int, sampler: BatchSampler, batch: int | None = None, first: int = 0) -> Tensor:
        """`count` images of the folder `name`, uint8 [N, 3, H, W]; image n has the seed `seed + first + n`."""
        folder, size = self.folder / name, batch or self.batch
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{n:05d}.png" for n in range(count)]
        chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
        mine = chunks[self.state.process_index :: self.state.num_processes]
        quiet = not self.state.is_main_process or all(f.is_file() for f in files)
        bar = tqdm(total=sum(map(len, mine)), desc=name, unit="image", file=sys.stderr, disable=quiet)
        for chunk in mine:
            if not all(files[n].is_file() for n in chunk):
                generators = [torch.Generator().manual_seed(self.seed + first + n) for n in chunk]
                sampled = float_to_uint8(sampler(chunk, generators).float().cpu().clamp(0, 1))
                for n, image in zip(chunk, sampled, strict=True):
                    _write(files[n], image)
            bar.update(len(chunk))
        bar.close()
        self.state.wait_for_everyone()
        return read_images(files)

    def delete(self, which: Callable[[str], bool] = lambda name: True) -> None:
        """Delete all folders, or those whose name `which` selects."""
        for folder in self.folder.glob("*"):
            if which(folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, image: Tensor) -> None:
    write_beside(path, lambda partial: save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), partial))


def read_images(files: Sequence[Path]) -> Tensor:
    """Images of one size, uint8 [N, 3, H, W]. Raises ValueError, naming the file, for one that is damaged."""
    images = []
    for path in files:
        try:
            with Image.open(path) as file:
                images.append(np.asarray(file.convert("RGB")))
        except OSError as error:
            raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); delete it to have it drawn again") from None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
