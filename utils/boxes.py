"""Conversions between box formats, and pairwise overlap. Each name carries its format."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> (..., 4) corners. Any unit."""
    cx, cy, w, h = boxes_cxcywh.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) centre x, centre y, width, height. Any unit."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def pairwise_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """IoU of every box of one set with every box of the other.

    boxes1_xyxy: (..., N, 4), boxes2_xyxy: (..., M, 4), one unit. Returns (..., N, M) in 0..1;
    two boxes without area have IoU 0.
    """
    top_left = torch.maximum(boxes1_xyxy[..., :, None, :2], boxes2_xyxy[..., None, :, :2])
    bottom_right = torch.minimum(boxes1_xyxy[..., :, None, 2:], boxes2_xyxy[..., None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    area1 = (boxes1_xyxy[..., 2:] - boxes1_xyxy[..., :2]).clamp(min=0).prod(-1)
    area2 = (boxes2_xyxy[..., 2:] - boxes2_xyxy[..., :2]).clamp(min=0).prod(-1)
    union = area1[..., :, None] + area2[..., None, :] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)
