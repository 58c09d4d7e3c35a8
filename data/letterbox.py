"""Fit an image into the network input with its aspect kept, and map boxes there and back."""

import numpy as np
from torch import Tensor

from data.image import resize

GREY = 128  # the padding: the fork's grey


def letterbox_geometry(
    image_hw: tuple[int, int], input_hw: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where an image lands in the padded input: (top, left, height, width) in input pixels.

    Raises:
        ValueError: If a size is not positive.
    """
    if min(*image_hw, *input_hw) <= 0:
        raise ValueError(f"sizes must be positive, got image {image_hw}, input {input_hw}")
    scale = min(input_hw[0] / image_hw[0], input_hw[1] / image_hw[1])
    height = max(1, min(input_hw[0], round(image_hw[0] * scale)))
    width = max(1, min(input_hw[1], round(image_hw[1] * scale)))
    return (input_hw[0] - height) // 2, (input_hw[1] - width) // 2, height, width


def letterbox(image: np.ndarray, input_hw: tuple[int, int]) -> np.ndarray:
    """Resize with aspect kept, antialiased when shrinking, and pad with grey, centred.

    image: (H, W, 3) uint8. Returns (*input_hw, 3) uint8.
    """
    top, left, height, width = letterbox_geometry(image.shape[:2], input_hw)
    canvas = np.full((*input_hw, 3), GREY, dtype=np.uint8)
    canvas[top : top + height, left : left + width] = resize(image, (height, width))
    return canvas


def image_to_letterbox(
    boxes_xyxy: Tensor, image_hw: tuple[int, int], input_hw: tuple[int, int]
) -> Tensor:
    """Map boxes from the original image into the padded input. (N, 4) pixels in and out."""
    top, left, height, width = letterbox_geometry(image_hw, input_hw)
    scale = boxes_xyxy.new_tensor([width / image_hw[1], height / image_hw[0]]).repeat(2)
    return boxes_xyxy * scale + boxes_xyxy.new_tensor([left, top, left, top])


def letterbox_to_image(
    boxes_xyxy: Tensor, input_hw: tuple[int, int], image_hw: tuple[int, int]
) -> Tensor:
    """Map boxes from the padded input back to the original image. Inverse of the above.

    Args:
        boxes_xyxy: (N, 4), pixels of the input.

    Returns:
        (N, 4), pixels of the image, clipped to it.

    Raises:
        ValueError: If a size is not positive.
    """
    top, left, height, width = letterbox_geometry(image_hw, input_hw)
    offset = boxes_xyxy.new_tensor([left, top, left, top])
    scale = boxes_xyxy.new_tensor([image_hw[1] / width, image_hw[0] / height]).repeat(2)
    limit = boxes_xyxy.new_tensor([image_hw[1], image_hw[0]]).repeat(2)
    return ((boxes_xyxy - offset) * scale).clamp(min=0).minimum(limit)
