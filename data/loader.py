"""Training batches, loaded by workers ahead of the steps."""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, get_worker_info

from data.dataset import VocDataset, init_worker
from data.sampler import BLOCK, EpochBatchSampler
from utils.errors import UserError

Batch = tuple[Tensor, Tensor]
SHARED_MEMORY = "/dev/shm"  # of Linux: Docker gives 64 MB of it where nothing else is said
LEAST_TARGETS = 64
NOTHING = (0.0, -1.0, 0.0, 0.0, 0.0, 0.0)  # an ignore region of image 0, without area
PREFETCH = 2  # what a worker has ready of its next batches
CURE = "start Docker with --shm-size=8g, or give fewer --num_workers or a smaller --batch_size."


class TrainingLoader:
    """Iterates over an epoch's batches, in the sampler's order: images uint8 (B, 3, H, W), targets
    (N, 6).

    A worker is given all batches of a block of mosaic partners (data.sampler.EpochBlocks), so that
    it decodes an image about once, however many workers there are; ranks that share a block each
    decode what their own samples need of it. Workers live until the loader goes.

    for_gpu: batches lie in pinned memory, and their targets are padded.
    Raises UserError where there is too little shared memory for what they load ahead.
    """

    def __init__(
        self,
        train_set: VocDataset,
        sampler: EpochBatchSampler,
        *,
        num_workers: int,
        for_gpu: bool = False,
    ):
        height, width = train_set.input_shape
        ahead = num_workers * PREFETCH * max(BLOCK, sampler.batch_size)
        check_shared_memory(ahead * height * width * 3)
        self.sampler = sampler
        self._loader = DataLoader(
            train_set,
            batch_sampler=BlockSampler(sampler),
            collate_fn=partial(collate_batches, batch_size=sampler.batch_size, pad=for_gpu),
            num_workers=num_workers,
            prefetch_factor=PREFETCH if num_workers else None,
            worker_init_fn=init_worker,
            persistent_workers=num_workers > 0,
            pin_memory=for_gpu,
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


def collate(items: Sequence[Batch], *, pad: bool = False) -> Batch:
    """Items -> images uint8 (B, 3, H, W) in channels_last memory, targets (N, 6).

    A target is image_index, class_id, cx, cy, w, h. For `DataLoader(collate_fn=collate)`.
    With `pad` N is a power of two, LEAST_TARGETS or more, so that a step's shapes are few: the
    rows behind the targets are ignore regions without area, which change nothing.
    """
    images, targets = zip(*items, strict=True)
    rows = [image.permute(1, 2, 0) for image in images]
    batch = torch.stack(rows, out=room(len(rows), *rows[0].shape, dtype=torch.uint8))
    counts = torch.tensor([len(target) for target in targets])
    image_index = torch.arange(len(items)).repeat_interleave(counts)
    number = len(image_index)
    length = max(LEAST_TARGETS, 1 << (number - 1).bit_length()) if pad else number
    joined = room(length, 6, dtype=torch.float32)
    joined[number:] = torch.tensor(NOTHING)
    torch.cat((image_index[:, None].float(), torch.cat(targets)), dim=1, out=joined[:number])
    return batch.permute(0, 3, 1, 2), joined


def check_shared_memory(need: int, folder: str = SHARED_MEMORY) -> None:
    """Raises UserError where less than `need` bytes of shared memory are free on this machine."""
    if os.path.isdir(folder) and (free := shutil.disk_usage(folder).free) < need:
        raise UserError(
            f"the data loading processes need up to {need / 1e6:.0f} MB of shared memory, and "
            f"{folder} has {free / 1e6:.0f} MB free: {CURE}"
        )


def room(*shape: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor; in a DataLoader's worker in shared memory, as torch's own collate has it.

    Else the queue would copy it there, in a thread whose error (no space left) nobody hears: the
    batch would be lost, and training wait for it for ever.
    """
    if get_worker_info() is None or 0 in shape:
        return torch.empty(shape, dtype=dtype)
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    except RuntimeError as error:
        raise UserError(
            f"a data loading process has no shared memory left: {CURE} ({error})"
        ) from None
    return torch.empty(0, dtype=dtype).set_(storage).resize_(shape)


def collate_batches(items: Sequence[Batch], batch_size: int, *, pad: bool) -> list[Batch]:
    """Items of several batches -> what `collate` makes of each."""
    starts = range(0, len(items), batch_size)
    return [collate(items[start : start + batch_size], pad=pad) for start in starts]


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
