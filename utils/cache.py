"""Decoded pictures in memory, within a fixed budget, shared by all workers of a DataLoader."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.image import read_image
from utils.letterbox import letterbox_geometry, resize
from utils.voc import Sample

GIB = 2**30


def read_sample(sample: Sample) -> np.ndarray:
    """The (H, W, 3) uint8 RGB picture of a sample, upright.

    Raises UserError if it does not have the size that its boxes refer to.
    """
    image = read_image(sample.image_path)
    if image.shape[:2] != tuple(sample.image_hw):
        raise UserError(
            f"{sample.image_path}: has height and width {image.shape[:2]}, but had "
            f"{tuple(sample.image_hw)} when the split was read. Start again if it was replaced."
        )
    return image


class PictureCache:
    """Pictures by index: the first ones from memory, decoded once, the rest from disk.

    Pictures too large for `limit_hw` (height, width) are kept shrunk to fit in it, as `letterbox`
    would; none is enlarged. As many as `budget_bytes` holds are decoded at construction: the
    memory never grows, and forked workers share it. It is one tensor because spawned workers then
    share it too, where a NumPy array would be copied to each.
    """

    def __init__(self, samples: Sequence[Sample], limit_hw: tuple[int, int], budget_bytes: int):
        self.samples = samples
        self._shapes = [kept_shape(sample.image_hw, limit_hw) for sample in samples]
        ends = np.cumsum([0] + [int(np.prod(shape)) for shape in self._shapes])
        self._starts = ends[: 1 + np.searchsorted(ends[1:], budget_bytes, side="right")]
        self._pixels = torch.empty(int(self._starts[-1]), dtype=torch.uint8)
        if len(self):
            self._fill()

    def __len__(self) -> int:
        """How many pictures are in memory."""
        return len(self._starts) - 1

    def read(self, index: int) -> np.ndarray:
        """Picture `index`, (H, W, 3) uint8 RGB; one from memory must not be written to."""
        return self._view(index) if index < len(self) else read_sample(self.samples[index])

    def _view(self, index: int) -> np.ndarray:
        pixels = self._pixels[self._starts[index] : self._starts[index + 1]]
        return pixels.numpy().reshape(self._shapes[index])

    def _fill(self) -> None:
        size = f"{self._pixels.numel() / GIB:.2f} GiB"
        text = f"decoding {len(self)} of {len(self.samples)} pictures into memory ({size})"
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in tqdm(pool.map(self._decode, range(len(self))), desc=text, total=len(self)):
                pass

    def _decode(self, index: int) -> None:
        height, width, _ = self._shapes[index]
        self._view(index)[:] = resize(read_sample(self.samples[index]), (height, width))


def kept_shape(image_hw: tuple[int, int], limit_hw: tuple[int, int]) -> tuple[int, int, int]:
    """The shape that a picture is kept in: its own, or the one that fits into the limit."""
    _, _, height, width = letterbox_geometry(image_hw, limit_hw)
    return min(height, image_hw[0]), min(width, image_hw[1]), 3
