"""Decoded pictures in memory, within a fixed budget, shared by all workers of a DataLoader."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.image import read_image, reduce
from utils.letterbox import letterbox_geometry, resize
from utils.voc import Sample

GIB = 2**30
REDUCTIONS = (1, 2, 4, 8)  # at which a JPEG can be decoded


def read_sample(sample: Sample, reduction: int = 1) -> np.ndarray:
    """The (H, W, 3) uint8 RGB picture of a sample, upright, reduced as by `read_image`.

    Raises UserError if it does not have the size that its boxes refer to.
    """
    image = read_image(sample.image_path, reduction=reduction)
    expected = reduced_hw(sample.image_hw, reduction)
    if image.shape[:2] != expected:
        raise UserError(
            f"{sample.image_path}: has height and width {image.shape[:2]}, but had {expected} when "
            "the split was read. Start again if it was replaced."
        )
    return image


def reduced_hw(image_hw: tuple[int, int], reduction: int) -> tuple[int, int]:
    """The size of a picture reduced by `read_image`."""
    return -(-image_hw[0] // reduction), -(-image_hw[1] // reduction)


def choose_reduction(image_hw: tuple[int, int], size_hw: tuple[int, int]) -> int:
    """The strongest reduction of a picture that is to be drawn at `size_hw` and not enlarged."""
    ratio = min(image_hw[0] / size_hw[0], image_hw[1] / size_hw[1])
    return max((reduction for reduction in REDUCTIONS if reduction <= ratio), default=1)


class PictureCache:
    """Pictures by index: the first ones from memory, decoded once, the rest from disk.

    Pictures too large for `limit_hw` (height, width) are kept shrunk to fit in it, as `letterbox`
    would; none is enlarged. `reduced`: each is also kept at a half, a quarter and an eighth, a
    third more memory, for `read_for`. As many as `budget_bytes` holds are decoded at construction:
    the memory never grows, and forked workers share it. It is one tensor because spawned workers
    then share it too, where a NumPy array would be copied to each.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        limit_hw: tuple[int, int],
        budget_bytes: int,
        *,
        reduced: bool = False,
    ):
        self.samples = samples
        self._reductions = REDUCTIONS if reduced else (1,)
        self._sizes = [kept_hw(sample.image_hw, limit_hw) for sample in samples]
        ends = np.cumsum([0] + [self._offset(hw, len(REDUCTIONS)) for hw in self._sizes])
        self._starts = ends[: 1 + np.searchsorted(ends[1:], budget_bytes, side="right")].tolist()
        self._pixels = torch.empty(self._starts[-1], dtype=torch.uint8)
        if len(self):
            self._fill()

    def __len__(self) -> int:
        """How many pictures are in memory."""
        return len(self._starts) - 1

    def read(self, index: int) -> np.ndarray:
        """Picture `index`, (H, W, 3) uint8 RGB; one from memory must not be written to."""
        return self._view(index, 1) if index < len(self) else read_sample(self.samples[index])

    def read_for(
        self, index: int, size_hw: tuple[int, int]
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """Picture `index` as small as it may be to be drawn at `size_hw`, and its scale.

        The scale says how many of its pixels make one of the sample's, (down, across).
        """
        kept = self._sizes[index] if index < len(self) else self.samples[index].image_hw
        reduction = choose_reduction(kept, size_hw)
        if index >= len(self):
            image = read_sample(self.samples[index], reduction)
        elif reduction in self._reductions:
            image = self._view(index, reduction)
        else:
            image, reduction = self._view(index, 1), 1
        height, width = self.samples[index].image_hw
        return image, (kept[0] / height / reduction, kept[1] / width / reduction)

    def _offset(self, kept: tuple[int, int], count: int) -> int:
        """Bytes that a picture's first `count` reductions take."""
        sizes = (reduced_hw(kept, reduction) for reduction in self._reductions[:count])
        return sum(3 * height * width for height, width in sizes)

    def _view(self, index: int, reduction: int) -> np.ndarray:
        kept = self._sizes[index]
        height, width = reduced_hw(kept, reduction)
        start = self._starts[index] + self._offset(kept, self._reductions.index(reduction))
        pixels = self._pixels[start : start + 3 * height * width]
        return pixels.numpy().reshape(height, width, 3)

    def _fill(self) -> None:
        size = f"{self._pixels.numel() / GIB:.2f} GiB"
        text = f"decoding {len(self)} of {len(self.samples)} pictures into memory ({size})"
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in tqdm(pool.map(self._decode, range(len(self))), desc=text, total=len(self)):
                pass

    def _decode(self, index: int) -> None:
        """Fill in a picture's reductions: as from disk, unless it is kept shrunk."""
        sample, kept = self.samples[index], self._sizes[index]
        whole = resize(read_sample(sample), kept)
        for reduction in self._reductions:
            if reduction == 1 or kept != tuple(sample.image_hw):
                self._view(index, reduction)[:] = reduce(whole, reduction)
            else:
                self._view(index, reduction)[:] = read_sample(sample, reduction)


def kept_hw(image_hw: tuple[int, int], limit_hw: tuple[int, int]) -> tuple[int, int]:
    """The size that a picture is kept in: its own, or the one that fits into the limit."""
    _, _, height, width = letterbox_geometry(image_hw, limit_hw)
    return min(height, image_hw[0]), min(width, image_hw[1])
