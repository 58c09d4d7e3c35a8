"""Training batches, loaded by workers ahead of the steps."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from data.dataset import VocDataset, collate, init_worker
from data.sampler import BLOCK, EpochBatchSampler

Batch = tuple[Tensor, Tensor]


class TrainingLoader:
    """Iterates over an epoch's batches, in the sampler's order: images uint8 (B, 3, H, W), targets
    (N, 6).

    A worker is given all batches of a block of mosaic partners (data.sampler.EpochBlocks), so that
    it decodes an image about once, however many workers there are; ranks that share a block each
    decode what their own samples need of it. Workers live until the loader goes.
    """

    def __init__(
        self,
        train_set: VocDataset,
        sampler: EpochBatchSampler,
        *,
        num_workers: int,
        pin_memory: bool,
    ):
        self._loader = DataLoader(
            train_set,
            batch_sampler=BlockSampler(sampler),
            collate_fn=partial(collate_batches, batch_size=sampler.batch_size),
            num_workers=num_workers,
            worker_init_fn=init_worker,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[Batch]:
        for batches in self._loader:
            yield from batches


class BlockSampler(Sampler[list[int]]):
    """The batches of a sampler, joined as far as they lie in one block."""

    def __init__(self, batches: EpochBatchSampler):
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        in_a_step = self.batches.batch_size * self.batches.world_size
        steps = max(1, BLOCK // in_a_step)
        joined: list[int] = []
        for step, batch in enumerate(self.batches, start=self.batches.start_step + 1):
            joined += batch
            if step % steps == 0:
                yield joined
                joined = []
        if joined:
            yield joined


def collate_batches(items: Sequence[Batch], batch_size: int) -> list[Batch]:
    """Items of several batches -> what `collate` makes of each."""
    starts = range(0, len(items), batch_size)
    return [collate(items[start : start + batch_size]) for start in starts]


def to_input(
    images: Tensor, device: torch.device, size_hw: tuple[int, int] | None = None
) -> Tensor:
    """uint8 (B, 3, H, W) on the host -> float32 0..1 on the device, channels_last.

    size_hw: resized to it, bilinear and, as validation's images are, antialiased.
    """
    images = images.to(device, non_blocking=True)
    if size_hw is not None and size_hw != tuple(images.shape[2:]):
        # Bytes on a CPU: 8 images of 416 x 416 to 320 x 320 take 2.2 ms, antialiased or not, and
        # 65 in float32. CUDA's antialiased kernel takes floats alone.
        pixels = images.float() if images.is_cuda else images
        images = F.interpolate(pixels, size=size_hw, mode="bilinear", antialias=True)
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)
