"""Training augmentation, the original fork's: size and aspect jitter, flip, HSV, mosaic, mixup.

An image reaches the canvas by one resize, of the part that will be seen. That part and its place
are whole pixels, and boxes take the scale between the two, so that they follow the pixels exactly.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data.image import resize
from data.letterbox import GREY
from utils.errors import UserError

MIN_BOX_SIDE = 1.0  # pixels of the canvas: a box as thin as this or thinner is dropped
LEVELS = np.arange(256.0)
# (below, right) of the seams
MOSAIC_QUADRANTS = tuple(itertools.product((False, True), (False, True)))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How strongly images are changed; the defaults are the fork's.

    Raises UserError for a value out of range.
    """

    scale: tuple[float, float] = (0.25, 2.0)  # size against the largest that fits the input
    jitter: float = 0.3  # aspect changes by U(1 - jitter, 1 + jitter) / U(1 - jitter, 1 + jitter)
    flip_prob: float = 0.5  # left to right
    hue: float = 0.1  # each gain is 1 + U(-1, 1) * this
    saturation: float = 0.7
    value: float = 0.4
    mosaic_scale: tuple[float, float] = (0.4, 1.0)  # like scale, for each image of a mosaic
    mosaic_centre: tuple[float, float] = (0.3, 0.7)  # where the seams cross, fraction of the input
    min_visible: float = 0.0  # a box with less of its area in view becomes an ignore region

    def __post_init__(self):
        for name, limit in (("scale", 100), ("mosaic_scale", 100), ("mosaic_centre", 1)):
            low, high = value = getattr(self, name)
            if not 0 < low <= high < limit:
                raise UserError(f"{name} is {value}; give low, high: 0 < low <= high < {limit}.")
        for name in ("jitter", "flip_prob", "hue", "saturation", "value", "min_visible"):
            value, limit = getattr(self, name), 0.9 if name == "jitter" else 1
            if not 0 <= value <= limit:
                raise UserError(f"{name} is {value}; give a number from 0 to {limit}.")


@dataclasses.dataclass(frozen=True)
class LabelledImage:
    """An image with its objects."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes_xyxy: np.ndarray  # (n, 4) float32, pixels of `image`
    class_ids: np.ndarray  # (n,) int64; -1 is an ignore region


@dataclasses.dataclass(frozen=True)
class Source:
    """An image with its objects that is read once it is known how large it will be drawn."""

    image_hw: tuple[int, int]
    boxes_xyxy: np.ndarray  # (n, 4) float32, pixels of an image of that size
    class_ids: np.ndarray
    # For the (height, width) to draw: pixels, as few as will do, and how many of them, (down,
    # across), make one of an image of `image_hw`.
    read_for: Callable[[tuple[int, int]], tuple[np.ndarray, tuple[float, float]]]

    def for_size(self, size_hw: tuple[int, int]) -> LabelledImage:
        """The whole image, as small as it may be to be drawn at `size_hw`."""
        image, (down, across) = self.read_for(size_hw)
        scale = np.array((across, down, across, down), np.float32)
        return LabelledImage(image, self.boxes_xyxy * scale, self.class_ids)


class Placement(NamedTuple):
    """A part of an image and where on the canvas it goes; all edges are whole pixels."""

    part_xyxy: tuple[int, int, int, int]
    canvas_xyxy: tuple[int, int, int, int]
    flip: bool

    def draw(self, image: np.ndarray, canvas: np.ndarray) -> None:
        """Resize the part of `image` into its place on `canvas`."""
        x1, y1, x2, y2 = self.part_xyxy
        left, top, right, bottom = self.canvas_xyxy
        patch = resize(image[y1:y2, x1:x2], (bottom - top, right - left))
        canvas[top:bottom, left:right] = cv2.flip(patch, 1) if self.flip else patch

    def box_map(self) -> tuple[tuple[float, ...], ...]:
        """For boxes of the image: (smallest, largest, subtract, multiply, add), four each.

        A flipped box comes out with its left and right edge exchanged.
        """
        x1, y1, x2, y2 = self.part_xyxy
        left, top, right, bottom = self.canvas_xyxy
        scale_x, scale_y = (right - left) / (x2 - x1), (bottom - top) / (y2 - y1)
        start, scale_x = (x2, -scale_x) if self.flip else (x1, scale_x)
        scale = (scale_x, scale_y, scale_x, scale_y)
        return (x1, y1, x1, y1), (x2, y2, x2, y2), (start, y1, start, y1), scale, (left, top) * 2


def place_image(
    image_hw: tuple[int, int],
    area_xyxy: tuple[int, int, int, int],
    *,
    size_hw: tuple[int, int],
    top_left: tuple[int, int],
    flip: bool,
) -> Placement:
    """Where an image goes that is flipped or not, resized to `size_hw` and put at `top_left`.

    What lies outside the area of the canvas is not drawn, but some must lie inside. That part is
    rounded to whole pixels of the image, at least one.
    """
    sides = []
    for axis, area in enumerate((area_xyxy[1::2], area_xyxy[::2])):
        whole, size, offset = image_hw[axis], size_hw[axis], top_left[axis]
        start, stop = max(offset, area[0]), min(offset + size, area[1])
        first = min(round((start - offset) * whole / size), whole - 1)
        last = max(round((stop - offset) * whole / size), first + 1)
        sides.append((first, last, start, stop))
    (y1, y2, top, bottom), (x1, x2, left, right) = sides
    if flip:
        x1, x2 = image_hw[1] - x2, image_hw[1] - x1
    return Placement((x1, y1, x2, y2), (left, top, right, bottom), flip)


def seen_boxes(
    images: Sequence[LabelledImage], placements: Sequence[Placement], *, min_visible: float
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes_xyxy (n, 4) float32 and class_ids (n,) of what is seen of placed images.

    Boxes are cut at the edges of the part seen, and dropped when a side is MIN_BOX_SIDE or less; of
    the others, those with less than `min_visible` of their area in view get the class -1. All
    images at once: a call of NumPy costs as much as its work here.
    """
    counts = [len(image.boxes_xyxy) for image in images]
    whole = np.concatenate([image.boxes_xyxy for image in images])
    class_ids = np.concatenate([image.class_ids for image in images])
    maps = np.array([placement.box_map() for placement in placements])
    low, high, subtract, multiply, add = np.repeat(maps, counts, axis=0).transpose(1, 0, 2)
    in_view = np.clip(whole, np.float32(low), np.float32(high))
    if min_visible:
        hidden = box_areas(in_view) < min_visible * box_areas(whole)
        class_ids = np.where(hidden, -1, class_ids)
    mapped = ((in_view - subtract) * multiply + add).astype(np.float32)
    first, second = mapped[:, :2], mapped[:, 2:]
    boxes_xyxy = np.concatenate((np.minimum(first, second), np.maximum(first, second)), axis=1)
    keep = (np.abs(second - first) > MIN_BOX_SIDE).all(axis=1)
    return boxes_xyxy[keep], class_ids[keep]


def box_areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(n, 4) -> (n,) width times height."""
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)


def random_size(
    image_hw: tuple[int, int],
    input_hw: tuple[int, int],
    *,
    scale: tuple[float, float],
    jitter: float,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Draw a new aspect and a new size; scale 1 is the largest that fits the input."""
    height, width = image_hw
    stretched = width * rng.uniform(1 - jitter, 1 + jitter) / rng.uniform(1 - jitter, 1 + jitter)
    factor = rng.uniform(*scale) * min(input_hw[0] / height, input_hw[1] / stretched)
    return max(1, round(height * factor)), max(1, round(stretched * factor))


def random_hsv(
    image: np.ndarray, augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """Multiply hue (around the circle), saturation and value by random gains."""
    ranges = np.array([augmentation.hue, augmentation.saturation, augmentation.value])
    gains = 1 + rng.uniform(-1, 1, 3) * ranges
    return scale_hsv(image, gains) if ranges.any() else image


def scale_hsv(image: np.ndarray, gains: Sequence[float]) -> np.ndarray:
    """Multiply hue, saturation and value of an (H, W, 3) uint8 RGB image, by tables of 256."""
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    for plane, gain, period in zip(planes, gains, (180, None, None), strict=True):
        levels = np.rint(LEVELS * gain)  # OpenCV's hue is in steps of two degrees
        table = levels % period if period else levels.clip(0, 255)
        cv2.LUT(plane, table.astype(np.uint8), plane)  # three tables of one are twice as fast
    return cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2RGB)


def random_single(
    source: Source,
    input_hw: tuple[int, int],
    *,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> LabelledImage:
    """One image at a random size and aspect, anywhere on grey, perhaps flipped, recoloured."""
    canvas = np.full((*input_hw, 3), GREY, dtype=np.uint8)
    size_hw = random_size(
        source.image_hw, input_hw, scale=augmentation.scale, jitter=augmentation.jitter, rng=rng
    )
    rooms = [side - size for side, size in zip(input_hw, size_hw, strict=True)]
    top, left = (int(rng.integers(min(0, room), max(0, room), endpoint=True)) for room in rooms)
    flip = rng.random() < augmentation.flip_prob
    image = source.for_size(size_hw)
    area_xyxy = (0, 0, input_hw[1], input_hw[0])
    placement = place_image(
        image.image.shape[:2], area_xyxy, size_hw=size_hw, top_left=(top, left), flip=flip
    )
    placement.draw(image.image, canvas)
    seen = seen_boxes([image], [placement], min_visible=augmentation.min_visible)
    return LabelledImage(random_hsv(canvas, augmentation, rng), *seen)


def random_mosaic(
    sources: Sequence[Source],
    input_hw: tuple[int, int],
    *,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> LabelledImage:
    """Four images around a random crossing, each with a corner at it; boxes end at the seams."""
    canvas = np.full((*input_hw, 3), GREY, dtype=np.uint8)
    fractions = rng.uniform(*augmentation.mosaic_centre, size=2)
    seam_row, seam_column = (
        min(max(round(fraction * side), 1), side - 1)
        for fraction, side in zip(fractions.tolist(), input_hw, strict=True)
    )
    placed = [
        place_at_corner(
            source,
            (seam_row, seam_column),
            after_seam,
            input_hw,
            augmentation=augmentation,
            rng=rng,
        )
        for source, after_seam in zip(sources, MOSAIC_QUADRANTS, strict=True)
    ]
    for image, placement in placed:
        placement.draw(image.image, canvas)
    images, placements = zip(*placed, strict=True)
    seen = seen_boxes(images, placements, min_visible=augmentation.min_visible)
    return LabelledImage(random_hsv(canvas, augmentation, rng), *seen)


def place_at_corner(
    source: Source,
    seam: tuple[int, int],
    after_seam: tuple[bool, bool],
    input_hw: tuple[int, int],
    *,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[LabelledImage, Placement]:
    """An image at a random size with a corner at the crossing of the seams (row, column).

    after_seam: whether it is below, and right of, the crossing.
    """
    size_hw = random_size(
        source.image_hw,
        input_hw,
        scale=augmentation.mosaic_scale,
        jitter=augmentation.jitter,
        rng=rng,
    )
    flip = rng.random() < augmentation.flip_prob
    image = source.for_size(size_hw)
    (row, column), (height, width), (below, right) = seam, input_hw, after_seam
    area_xyxy = (
        *(column if right else 0, row if below else 0),
        *(width if right else column, height if below else row),
    )
    top_left = (row if below else row - size_hw[0], column if right else column - size_hw[1])
    placement = place_image(
        image.image.shape[:2], area_xyxy, size_hw=size_hw, top_left=top_left, flip=flip
    )
    return image, placement


def mixup(first: LabelledImage, second: LabelledImage) -> LabelledImage:
    """Half and half of two images of one size, with the objects of both."""
    return LabelledImage(
        cv2.addWeighted(first.image, 0.5, second.image, 0.5, 0.0),
        np.concatenate((first.boxes_xyxy, second.boxes_xyxy)),
        np.concatenate((first.class_ids, second.class_ids)),
    )
