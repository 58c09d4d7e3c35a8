"""The original fork's mosaic sample, written plainly from its description with Pillow.

The reference for the speed of loading. Boxes are (n, 5): xyxy in pixels, class.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image

GREY = (128, 128, 128)
HSV_RANGES = (0.1, 0.7, 0.4)
# Which sides of the centre each image takes: top left, bottom left, bottom right, top right.
RIGHT, BELOW = (False, False, True, True), (False, True, True, False)


def mosaic_sample(
    items: Sequence[tuple[Path, np.ndarray]], input_hw: tuple[int, int], rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Four labelled images as float32 (3, H, W) in 0..1 and boxes as cx, cy, w, h fractions."""
    height, width = input_hw
    centre = int(width * rng.uniform(0.3, 0.7)), int(height * rng.uniform(0.3, 0.7))
    canvas, kept = np.zeros((height, width, 3), np.uint8), []
    for (path, boxes), right, below in zip(items, RIGHT, BELOW, strict=True):
        whole, moved = place(path, boxes, input_hw, centre, (right, below), rng)
        columns = slice(centre[0], width) if right else slice(0, centre[0])
        rows = slice(centre[1], height) if below else slice(0, centre[1])
        canvas[rows, columns] = whole[rows, columns]
        kept += cut(moved, (columns.start, rows.start, columns.stop, rows.stop))
    image = scale_hsv(canvas, rng)
    boxes = np.array(kept, dtype=np.float32).reshape(-1, 5)
    centres, sizes = (boxes[:, :2] + boxes[:, 2:4]) / 2, boxes[:, 2:4] - boxes[:, :2]
    fractions = np.concatenate((centres, sizes), axis=1) / (width, height, width, height)
    return image.astype(np.float32).transpose(2, 0, 1) / 255, fractions


def place(
    path: Path,
    boxes: np.ndarray,
    input_hw: tuple[int, int],
    centre: tuple[int, int],
    corner: tuple[bool, bool],
    rng: Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The image on a grey canvas of the input's size, one corner at the centre; its boxes."""
    height, width = input_hw
    image = Image.open(path).convert("RGB")
    full_width, full_height = image.size
    boxes = boxes.copy()
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes[:, [0, 2]] = full_width - boxes[:, [2, 0]]
    aspect = full_width / full_height * rng.uniform(0.7, 1.3) / rng.uniform(0.7, 1.3)
    scale = rng.uniform(0.4, 1)
    new_height = int(scale * height) if aspect < 1 else int(scale * width / aspect)
    new_width = int(new_height * aspect) if aspect < 1 else int(scale * width)
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    left = centre[0] if corner[0] else centre[0] - new_width
    top = centre[1] if corner[1] else centre[1] - new_height
    canvas = Image.new("RGB", (width, height), GREY)
    canvas.paste(image, (left, top))
    boxes[:, [0, 2]] = boxes[:, [0, 2]] * new_width / full_width + left
    boxes[:, [1, 3]] = boxes[:, [1, 3]] * new_height / full_height + top
    return np.array(canvas), boxes


def cut(boxes: np.ndarray, area_xyxy: tuple[int, int, int, int]) -> list[list[float]]:
    """Boxes cut at the edges of an area, one by one; those of a pixel or less are dropped."""
    left, top, right, bottom = area_xyxy
    kept = []
    for x1, y1, x2, y2, class_id in boxes:
        x1, x2 = max(x1, left), min(x2, right)
        y1, y2 = max(y1, top), min(y2, bottom)
        if x2 - x1 > 1 and y2 - y1 > 1:
            kept.append([x1, y1, x2, y2, class_id])
    return kept


def scale_hsv(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Random gains of hue, saturation and value, by a table each."""
    gains = 1 + rng.uniform(-1, 1, 3) * HSV_RANGES
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    levels = np.arange(256)
    hue = cv2.LUT(hue, (levels * gains[0] % 180).astype(np.uint8))
    saturation = cv2.LUT(saturation, (levels * gains[1]).clip(0, 255).astype(np.uint8))
    value = cv2.LUT(value, (levels * gains[2]).clip(0, 255).astype(np.uint8))
    return cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2RGB)
