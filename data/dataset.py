"""VOC images as network input: letterboxed for validation, augmented for training."""

import math
import signal
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import Augmentation, LabelledImage, Source, mixup, random_mosaic, random_single
from data.cache import GIB, ImageCache
from data.letterbox import image_to_letterbox, letterbox
from data.sampler import EpochBlocks, random_generator, repeat_factors
from data.voc import Sample
from utils.errors import UserError
from utils.heap import keep_freed_memory

Item = tuple[Tensor, Tensor]


class VocDataset(Dataset[Item]):
    """Items (image, targets): uint8 (3, H, W) RGB and float32 (n, 5) of class_id, cx, cy, w, h.

    The four are fractions of the network input; class_id -1 is an ignore region (a difficult
    object). Every item depends on (seed, epoch, index) alone, so that worker count and resuming
    change nothing; the partners of a mosaic come from the image's `EpochBlocks`.

    Args:
        input_shape: (height, width) in pixels.
        train: True augments, False letterboxes.
        mosaic_prob: Share of the items that are mosaics of four images.
        mixup_prob: Share of the mosaics that are mixed with one more image.
        cache: Keep decoded images in memory, for training shrunk to the largest `scale` times the
            input.
        cache_gb: Limit of that memory in GiB.
        cache_dir: Folder of a file for the images beyond it; default: they are decoded anew.
        repeat_threshold: Classes in a smaller share of the images are oversampled
            (`repeat_factors`).

    Raises:
        UserError: For a probability outside 0..1, a negative seed or a cache_dir that cannot be
            written.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        input_shape: tuple[int, int],
        *,
        train: bool,
        mosaic_prob: float = 0.5,
        mixup_prob: float = 0.5,
        cache: bool = False,
        cache_gb: float = 2.0,
        cache_dir: str = "",
        seed: int = 0,
        repeat_threshold: float = 0.0,
        augmentation: Augmentation | None = None,
    ):
        for name, prob in (("mosaic_prob", mosaic_prob), ("mixup_prob", mixup_prob)):
            if not 0 <= prob <= 1:
                raise UserError(f"{name} is {prob}; give a number from 0 to 1.")
        if not 0 <= repeat_threshold <= 1:
            raise UserError(f"repeat_threshold is {repeat_threshold}; give a number from 0 to 1.")
        random_generator(seed)  # says now, not in a worker, that a seed is negative
        height, width = input_shape
        self.samples, self.input_shape, self.train = samples, (height, width), train
        self.mosaic_prob, self.mixup_prob, self.seed = mosaic_prob, mixup_prob, seed
        self.augmentation = augmentation or Augmentation()
        # Validation keeps what letterbox makes of an image, so that the cache changes no pixel.
        scales = (self.augmentation.scale[1], self.augmentation.mosaic_scale[1])
        largest = math.ceil(height * max(scales)), math.ceil(width * max(scales))
        self._images = ImageCache(
            samples,
            largest if train else self.input_shape,
            int(cache_gb * GIB) if cache else 0,
            reduced=train,
            folder=cache_dir if cache else "",
        )
        # Difficult objects are ignore regions.
        self._class_ids = [np.where(own.difficult, -1, own.class_ids) for own in samples]
        self.repeats = repeat_factors(samples, repeat_threshold)
        self._blocks = EpochBlocks(len(samples), seed=seed, repeats=self.repeats)
        # Shared memory: persistent workers hold copies of this object, but see this tensor.
        self._epoch_and_mosaic = torch.tensor([0, 1]).share_memory_()

    def set_epoch(self, epoch: int, *, mosaic: bool = True) -> None:
        """Choose the epoch's random numbers, in all workers; without `mosaic`, no mosaic, no mixup.

        Call it before iterating over a DataLoader: workers read ahead.
        """
        self._epoch_and_mosaic.copy_(torch.tensor([epoch, int(mosaic)]))

    def image_paths(self, indices: Sequence[int]) -> list[str]:
        """Where images of an epoch lie; indices as its sampler gives them."""
        return [self.samples[index % len(self.samples)].image_path for index in indices]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        if self.repeats is None:  # negative ones from the end; IndexError beyond it
            index = range(len(self.samples))[index]
        return self._augmented(index) if self.train else self._letterboxed(index)

    def _letterboxed(self, index: int) -> Item:
        sample = self.samples[index]
        image = letterbox(self._images.read(index), self.input_shape)
        boxes_xyxy = torch.from_numpy(sample.boxes_xyxy)
        boxes_xyxy = image_to_letterbox(boxes_xyxy, sample.image_hw, self.input_shape)
        return to_item(LabelledImage(image, boxes_xyxy.numpy(), self._class_ids[index]))

    def _augmented(self, index: int) -> Item:
        epoch, mosaic = self._epoch_and_mosaic.tolist()
        rng = random_generator(self.seed, epoch, index)
        how: dict[str, Any] = {"augmentation": self.augmentation, "rng": rng}
        if not mosaic or rng.random() >= self.mosaic_prob:
            return to_item(random_single(self._source(index), self.input_shape, **how))
        near = self._blocks.around(index, epoch=epoch)
        *partners, mixed = near[rng.integers(len(near), size=4)].tolist()
        indices = rng.permutation([index, *partners])
        sources = [self._source(i) for i in indices.tolist()]
        image = random_mosaic(sources, self.input_shape, **how)
        if rng.random() < self.mixup_prob:
            image = mixup(image, random_single(self._source(mixed), self.input_shape, **how))
        return to_item(image)

    def _source(self, index: int) -> Source:
        index %= len(self.samples)  # of an image that is repeated in the epoch
        sample = self.samples[index]
        read_for = partial(self._images.read_for, index)
        return Source(sample.image_hw, sample.boxes_xyxy, self._class_ids[index], read_for)


def to_item(image: LabelledImage) -> Item:
    """An image of the network input's size as tensors; the image stays (H, W, 3) in memory."""
    height, width = image.image.shape[:2]
    corners = image.boxes_xyxy / np.array((width, height, width, height), np.float32)
    targets = np.empty((len(corners), 5), np.float32)
    targets[:, 0] = image.class_ids
    targets[:, 1:3] = (corners[:, :2] + corners[:, 2:]) / 2
    targets[:, 3:] = corners[:, 2:] - corners[:, :2]
    return torch.from_numpy(image.image).permute(2, 0, 1), torch.from_numpy(targets)


def init_worker(_worker_id: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: a worker ignores Ctrl-C, which reaches all processes.

    Ctrl-C reaches all processes of a terminal: the main one decides. Its memory for images is
    kept: a forked worker has inherited the setting of the trainer's first step.
    """
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
