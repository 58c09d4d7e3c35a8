"""Decoded images in memory and in a file, shared by all workers of a DataLoader."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.image import read_image, reduce, resize
from data.letterbox import letterbox_geometry
from data.pixel_file import PixelFile, pixel_file
from data.sampler import BLOCK
from data.voc import Sample
from utils.errors import UserError

GIB = 2**30
REDUCTIONS = (1, 2, 4, 8)  # at which a JPEG can be decoded
RECENT_BYTES = 128 * 2**20  # 32 images of 1160 x 860 with their halves; of 640 x 480 it is 38
WINDOW = 64  # images decoded ahead of whoever takes them


def read_sample(sample: Sample, reduction: int = 1) -> np.ndarray:
    """The (H, W, 3) uint8 RGB image of a sample, upright, reduced as by `read_image`.

    Raises UserError if it does not have the size that its boxes refer to.
    """
    image = read_image(sample.image_path, reduction=reduction)
    height, width = sample.image_hw
    if image.shape[:2] != (-(-height // reduction), -(-width // reduction)):
        raise UserError(
            f"{sample.image_path}: has height and width {image.shape[:2]} at 1/{reduction} of its "
            f"size, but had {height, width} in full when the split was read. Start again if it was "
            "replaced."
        )
    return image


def reduced_hw(image_hw: tuple[int, int], reduction: int) -> tuple[int, int]:
    """The size of an image reduced by `read_image`."""
    return -(-image_hw[0] // reduction), -(-image_hw[1] // reduction)


def choose_reduction(image_hw: tuple[int, int], size_hw: tuple[int, int]) -> int:
    """The strongest reduction of an image that is to be drawn at `size_hw` and not enlarged."""
    ratio = min(image_hw[0] / size_hw[0], image_hw[1] / size_hw[1])
    return max((reduction for reduction in REDUCTIONS if reduction <= ratio), default=1)


class RecentImages:
    """The images that a process has used last, each in the reductions that were asked for.

    No more than `limit` images and `limit_bytes`: the one that was used longest ago goes first.
    """

    def __init__(self, limit: int, limit_bytes: int):
        self.limit, self.limit_bytes, self._bytes = limit, limit_bytes, 0
        self._images: OrderedDict[int, dict[int, np.ndarray]] = OrderedDict()

    def get(self, index: int, reduction: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """That image so reduced, made where it is not at hand; it must not be written to."""
        image = self._images.get(index, {}).get(reduction)
        if image is None:
            image = make()
            self._images.setdefault(index, {})[reduction] = image
            self._bytes += image.nbytes
        self._images.move_to_end(index)
        while len(self._images) > self.limit or self._bytes > self.limit_bytes:
            _, gone = self._images.popitem(last=False)
            self._bytes -= sum(image.nbytes for image in gone.values())
        return image

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, self.limit_bytes)  # another process starts with none


class ImageCache:
    """Images by index: the first ones from memory, the next from a file, the rest decoded anew.

    Images too large for `limit_hw` (height, width) are kept shrunk to fit in it, as `letterbox`
    would; none is enlarged. `reduced`: each is also kept at a half, a quarter and an eighth, a
    third more memory, for `read_for`. As many as `budget_bytes` holds are decoded at construction:
    the memory never grows, and forked workers share it. It is one tensor because spawned workers
    then share it too, where a NumPy array would be copied to each. `folder`: what exceeds the
    budget lies in a file there, mapped into the memory of all processes and taken up again by the
    next run. Without it, a process keeps what it has decoded last (RecentImages).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        limit_hw: tuple[int, int],
        budget_bytes: int,
        *,
        reduced: bool = False,
        folder: str = "",
    ):
        self.samples = samples
        self._reductions = REDUCTIONS if reduced else (1,)
        self._sizes = [kept_hw(sample.image_hw, limit_hw) for sample in samples]
        ends = np.cumsum([0] + [self._offset(hw, len(REDUCTIONS)) for hw in self._sizes])
        self._in_memory = int(np.searchsorted(ends[1:], budget_bytes, side="right"))
        self.kept = len(samples) if folder else self._in_memory  # in memory or in the file
        self._starts = ends[: 1 + self.kept].tolist()
        self._recent = RecentImages(BLOCK, RECENT_BYTES)
        self._pixels = torch.empty(self._starts[self._in_memory], dtype=torch.uint8)
        self._file: PixelFile | None = None
        if self._in_memory < self.kept:  # first, to raise early for an unusable folder
            self._file = self._open_file(folder)
        if self._in_memory:
            self._fill_memory()

    def read(self, index: int) -> np.ndarray:
        """Image `index`, (H, W, 3) uint8 RGB; one that is kept must not be written to."""
        return self._view(index, 1) if index < self.kept else read_sample(self.samples[index])

    def read_for(
        self, index: int, size_hw: tuple[int, int]
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """Image `index` as small as it may be to be drawn at `size_hw`, and its scale.

        The scale says how many of its pixels make one of the sample's, (down, across). It must not
        be written to.
        """
        kept = self._sizes[index] if index < self.kept else self.samples[index].image_hw
        reduction = choose_reduction(kept, size_hw)
        if index >= self.kept:
            least = choose_reduction(kept, self._sizes[index])
            reduction = max(reduction, least)
            image = self._decode(index, reduction, least)
        elif reduction in self._reductions:
            image = self._view(index, reduction)
        else:
            image, reduction = self._view(index, 1), 1
        height, width = self.samples[index].image_hw
        return image, (kept[0] / height / reduction, kept[1] / width / reduction)

    def _decode(self, index: int, reduction: int, least: int) -> np.ndarray:
        """An image from disk: reduced to `least` by the decoder, as far as every size allows, from
        there by halves, since it may be wanted larger in a moment."""

        def make() -> np.ndarray:
            if reduction == least:
                return read_sample(self.samples[index], least)
            return reduce(self._decode(index, reduction // 2, least), 2)

        return self._recent.get(index, reduction, make)

    def _offset(self, kept: tuple[int, int], count: int) -> int:
        """Bytes that an image's first `count` reductions take."""
        sizes = (reduced_hw(kept, reduction) for reduction in self._reductions[:count])
        return sum(3 * height * width for height, width in sizes)

    def _view(self, index: int, reduction: int) -> np.ndarray:
        kept = self._sizes[index]
        height, width = reduced_hw(kept, reduction)
        start = self._starts[index] + self._offset(kept, self._reductions.index(reduction))
        if index < self._in_memory:
            pixels = self._pixels.numpy()
        else:
            assert self._file is not None  # it holds what is not in memory
            pixels, start = self._file.pixels, start - len(self._pixels)
        return pixels[start : start + 3 * height * width].reshape(height, width, 3)

    def _fill_memory(self) -> None:
        whole = self._pixels.numpy()
        size = f"{len(whole) / GIB:.2f} GiB"
        text = f"decoding {self._in_memory} of {len(self.samples)} images into memory ({size})"
        for index, pixels in self._decoded(range(self._in_memory), text):
            whole[self._starts[index] : self._starts[index + 1]] = pixels

    def _open_file(self, folder: str) -> PixelFile:
        """The file of what is not in memory, written unless an earlier run has left it."""
        rest = range(self._in_memory, self.kept)
        content = [(self.samples[i].image_path, self._sizes[i], self._reductions) for i in rest]
        size = self._starts[-1] - len(self._pixels)
        text = f"decoding {len(rest)} of {len(self.samples)} images into {folder}"
        return pixel_file(
            folder, content, size, (pixels for _, pixels in self._decoded(rest, text))
        )

    def _decoded(self, indices: range, text: str) -> Iterator[tuple[int, np.ndarray]]:
        """Pairs of an index and all bytes of its image, in order, with a progress bar."""
        bar = tqdm(desc=text, total=len(indices), unit="image")
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(indices), WINDOW):
                window = indices[start : start + WINDOW]
                for index, pixels in zip(
                    window, pool.map(self._all_reductions, window), strict=True
                ):
                    yield index, pixels
                    bar.update()

    def _all_reductions(self, index: int) -> np.ndarray:
        """(bytes,) an image's reductions one behind the other: as from disk, unless it is kept
        shrunk."""
        images = [resize(read_sample(self.samples[index]), self._sizes[index])]
        for _ in self._reductions[1:]:
            images.append(reduce(images[-1], 2))
        return np.concatenate([image.reshape(-1) for image in images])


def kept_hw(image_hw: tuple[int, int], limit_hw: tuple[int, int]) -> tuple[int, int]:
    """The size that an image is kept in: its own, or the one that fits into the limit."""
    _, _, height, width = letterbox_geometry(image_hw, limit_hw)
    return min(height, image_hw[0]), min(width, image_hw[1])
