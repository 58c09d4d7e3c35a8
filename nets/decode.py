"""From raw network maps to boxes, and the anchors that both need."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

STRIDES = (8, 16, 32)
MAX_LOG_SIZE = 10.0  # tw and th are clamped to +-10 before exp, in loss and decode alike


# (width, height) in pixels; made for COCO at 416 x 416 (yolov4.cfg of AlexeyAB's darknet).
YOLOV4_ANCHORS = (
    *((12.0, 16.0), (19.0, 36.0), (40.0, 28.0)),
    *((36.0, 75.0), (76.0, 55.0), (72.0, 146.0)),
    *((142.0, 110.0), (192.0, 243.0), (459.0, 401.0)),
)


def read_anchors(path: str) -> tuple[tuple[float, float], ...]:
    """Read nine "w,h" pairs in pixels of the network input, small to large.

    Raises:
        UserError: If the file is missing or does not hold nine positive pairs.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        numbers = [float(word) for word in text.replace(",", " ").split()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read anchors ({error}). Give nine w,h pairs.") from None
    if len(numbers) != 18:
        raise UserError(f"{path}: expected nine w,h pairs, 18 numbers, found {len(numbers)}.")
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(f"{path}: anchors are positive sizes in input pixels, found {numbers}.")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def grid_offsets(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width, 2) float32 column and row of each cell."""
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    return torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)), dim=-1)


def decode_grid_boxes(
    raw: Tensor, offsets: Tensor, anchor_wh: Tensor, scale_xy: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Raw tx, ty, tw, th -> centre and size: x = i + s * sigmoid(tx) - (s - 1) / 2, w = exp(tw) a.

    Args:
        raw: (..., 4 or more).
        offsets: (..., 2) column and row of the cell, i.
        anchor_wh: (..., 2) width and height of the anchor, a, in cells.
        scale_xy: Grid sensitivity s.

    Returns:
        (..., 2) centre and (..., 2) size, in cells.
    """
    # offsets last: the result keeps the memory order of `raw`, which the loss reads faster
    centre = raw[..., :2].sigmoid() * scale_xy - (scale_xy - 1) / 2 + offsets
    size = raw[..., 2:4].clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp() * anchor_wh
    return centre, size


def decode(
    outputs: Sequence[Tensor],
    anchors: Sequence[Sequence[float]],
    input_shape: tuple[int, int],
    scale_xy: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Boxes, objectness and class probabilities from the network's raw maps.

    Args:
        outputs: Three (B, 3 * (5 + C), H/s, W/s) maps, strides 8, 16, 32.
        anchors: Nine (w, h) in pixels, small to large.
        input_shape: (height, width) in pixels.
        scale_xy: Grid sensitivity at strides 8, 16, 32.

    Returns:
        (B, K, 5 + C) float32: xyxy in input pixels, objectness, class probabilities. K runs over
        strides, then row, column, anchor: darknet's order, a plain view of a channels_last map.
    """
    decoded = []
    for index, raw in enumerate(outputs):
        batch, channels, rows, columns = raw.shape
        raw = raw.float().permute(0, 2, 3, 1).reshape(batch, rows, columns, 3, channels // 3)
        cell = raw.new_tensor([input_shape[1] / columns, input_shape[0] / rows])
        anchor_wh = raw.new_tensor(anchors[3 * index : 3 * index + 3])
        offsets = grid_offsets(rows, columns, raw.device)[:, :, None]
        centre, size = decode_grid_boxes(raw, offsets, anchor_wh / cell, scale_xy[index])
        corners = torch.cat((centre - size / 2, centre + size / 2), dim=-1) * cell.repeat(2)
        level = torch.cat((corners, raw[..., 4:].sigmoid()), dim=-1)
        decoded.append(level.reshape(batch, rows * columns * 3, channels // 3))
    return torch.cat(decoded, dim=1)
