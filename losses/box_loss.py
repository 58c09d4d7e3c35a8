"""Losses of paired boxes: 1 - IoU plus what IoU cannot see. Sources stand at each.

Boxes are (..., 4) centre x, centre y, width, height, broadcast against each other; YOLOLoss gives
grid units. Every loss and its gradient stay finite for identical, empty and huge boxes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from utils.errors import UserError

EPS = 1e-6


class _Pair(NamedTuple):
    """What the penalties share; all (...)."""

    iou: Tensor
    union: Tensor
    dx: Tensor  # distance of the centres
    dy: Tensor
    hull_w: Tensor  # of the smallest box that holds both
    hull_h: Tensor
    distance: Tensor  # squared, of the centres, over the hull's squared diagonal
    w1: Tensor
    h1: Tensor
    w2: Tensor
    h2: Tensor


def _iou(pair: _Pair) -> Tensor:
    """No penalty."""
    return torch.zeros_like(pair.iou)


def _giou(pair: _Pair) -> Tensor:
    """The hull's empty share (Rezatofighi et al. 2019)."""
    hull = pair.hull_w * pair.hull_h
    return (hull - pair.union) / hull.clamp(min=EPS)


def _diou(pair: _Pair) -> Tensor:
    """The distance of the centres (Zheng et al. 2020)."""
    return pair.distance


def _ciou(pair: _Pair) -> Tensor:
    """DIoU's and one for the aspect ratio (Zheng et al. 2020).

    Its alpha takes gradients, as in the original fork; torchvision detaches it.
    """
    angle1 = torch.atan(pair.w1 / pair.h1.clamp(min=EPS))
    angle2 = torch.atan(pair.w2 / pair.h2.clamp(min=EPS))
    v = (4 / math.pi**2) * (angle1 - angle2) ** 2
    alpha = v / (1 - pair.iou + v).clamp(min=EPS)
    return pair.distance + alpha * v


def _siou(pair: _Pair) -> Tensor:
    """Distance weighted by the angle of approach, and shape (Gevorgyan 2022).

    cos(2 asin(sin) - pi / 2) = 2 sin cos = 2 |dx dy| / d^2: the same value as the paper's chain of
    sqrt and asin, whose gradient is NaN where the centres meet.
    """
    gap = (pair.dx**2 + pair.dy**2).clamp(min=EPS**2)
    g = 2 - 2 * (pair.dx * pair.dy).abs() / gap
    relative_x = pair.dx / pair.hull_w.clamp(min=EPS)
    relative_y = pair.dy / pair.hull_h.clamp(min=EPS)
    distance = 2 - torch.exp(-g * relative_x**2) - torch.exp(-g * relative_y**2)
    change_w = (pair.w1 - pair.w2).abs() / torch.maximum(pair.w1, pair.w2).clamp(min=EPS)
    change_h = (pair.h1 - pair.h2).abs() / torch.maximum(pair.h1, pair.h2).clamp(min=EPS)
    shape = (1 - torch.exp(-change_w)) ** 4 + (1 - torch.exp(-change_h)) ** 4
    return (distance + shape) / 2


def _eiou(pair: _Pair) -> Tensor:
    """DIoU's and the squared differences of width and height (Zhang et al. 2021)."""
    width = (pair.w1 - pair.w2) ** 2 / (pair.hull_w**2).clamp(min=EPS)
    height = (pair.h1 - pair.h2) ** 2 / (pair.hull_h**2).clamp(min=EPS)
    return pair.distance + width + height


BOX_LOSSES = {  # kind -> what is added to 1 - IoU
    "iou": _iou,
    "giou": _giou,
    "diou": _diou,
    "ciou": _ciou,
    "siou": _siou,
    "eiou": _eiou,
}


def box_losses(kind: str, predicted_cxcywh: Tensor, target_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """1 - XIoU of paired boxes and their plain IoU, both (...).

    Args:
        kind: One of BOX_LOSSES.
        predicted_cxcywh: (..., 4).
        target_cxcywh: (..., 4).

    Raises:
        UserError: If the kind is unknown.
    """
    if kind not in BOX_LOSSES:
        raise UserError(f"box_loss {kind!r} is unknown. Allowed: {', '.join(BOX_LOSSES)}.")
    corners1 = box_convert(predicted_cxcywh, "cxcywh", "xyxy")
    corners2 = box_convert(target_cxcywh, "cxcywh", "xyxy")
    top_left = torch.maximum(corners1[..., :2], corners2[..., :2])
    bottom_right = torch.minimum(corners1[..., 2:], corners2[..., 2:])
    inner_w, inner_h = (bottom_right - top_left).clamp(min=0).unbind(-1)
    outer = torch.maximum(corners1[..., 2:], corners2[..., 2:]) - torch.minimum(
        corners1[..., :2], corners2[..., :2]
    )
    hull_w, hull_h = outer.unbind(-1)
    x1, y1, w1, h1 = predicted_cxcywh.unbind(-1)
    x2, y2, w2, h2 = target_cxcywh.unbind(-1)
    intersection = inner_w * inner_h
    union = w1 * h1 + w2 * h2 - intersection
    iou = intersection / union.clamp(min=EPS)
    dx, dy = x1 - x2, y1 - y2
    distance = (dx**2 + dy**2) / (hull_w**2 + hull_h**2).clamp(min=EPS)
    pair = _Pair(iou, union, dx, dy, hull_w, hull_h, distance, w1, h1, w2, h2)
    return 1 - pair.iou + BOX_LOSSES[kind](pair), pair.iou
