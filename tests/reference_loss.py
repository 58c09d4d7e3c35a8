"""The original fork's loss by its definition, slow and plain: the oracle of tests and benchmarks.

Loops over images, boxes and scales; confidence on probabilities clamped at 1e-7, as it had.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ANCHORS = (
    *((12, 16), (19, 36), (40, 28)),
    *((36, 75), (76, 55), (72, 146)),
    *((142, 110), (192, 243), (459, 401)),
)
STRIDES = (8, 16, 32)
BALANCE = (4.0, 1.0, 0.4)
EPS = 1e-7


def clamped_bce(probability: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of probabilities, kept off 0 and 1."""
    probability = probability.clamp(EPS, 1 - EPS)
    return -target * probability.log() - (1 - target) * (1 - probability).log()


def pairwise_overlap(truths: Tensor, boxes: Tensor) -> Tensor:
    """IoU of (T, 4) with (K, 4) centre-size boxes -> (T, K)."""
    low = torch.maximum(
        (truths[:, :2] - truths[:, 2:] / 2)[:, None], boxes[:, :2] - boxes[:, 2:] / 2
    )
    high = torch.minimum(
        (truths[:, :2] + truths[:, 2:] / 2)[:, None], boxes[:, :2] + boxes[:, 2:] / 2
    )
    intersection = (high - low).clamp(min=0).prod(-1)
    return intersection / (truths[:, 2:].prod(-1)[:, None] + boxes[:, 2:].prod(-1) - intersection)


def ciou(boxes: Tensor, truths: Tensor) -> Tensor:
    """Complete IoU of paired (P, 4) centre-size boxes in grid units; alpha takes gradients."""
    low1, high1 = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    low2, high2 = truths[:, :2] - truths[:, 2:] / 2, truths[:, :2] + truths[:, 2:] / 2
    intersection = (torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0).prod(-1)
    union = boxes[:, 2:].prod(-1) + truths[:, 2:].prod(-1) - intersection
    iou = intersection / union.clamp(min=1e-6)
    distance = ((boxes[:, :2] - truths[:, :2]) ** 2).sum(-1)
    diagonal = ((torch.maximum(high1, high2) - torch.minimum(low1, low2)) ** 2).sum(-1)
    angle1 = torch.atan(boxes[:, 2] / boxes[:, 3].clamp(min=1e-6))
    angle2 = torch.atan(truths[:, 2] / truths[:, 3].clamp(min=1e-6))
    v = 4 / math.pi**2 * (angle1 - angle2) ** 2
    alpha = v / (1 - iou + v).clamp(min=1e-6)
    return iou - distance / diagonal.clamp(min=1e-6) - alpha * v


def best_anchor(width: float, height: float) -> int:
    """Which of the nine anchors fits a box of these pixels best."""
    best, best_iou = 0, -1.0
    for index, (anchor_w, anchor_h) in enumerate(ANCHORS):
        intersection = min(width, anchor_w) * min(height, anchor_h)
        iou = intersection / (width * height + anchor_w * anchor_h - intersection)
        if iou > best_iou:
            best, best_iou = index, iou
    return best


def build_target(targets: Tensor, scale: int, shape: torch.Size, num_classes: int) -> Tensor:
    """(B, 3, H, W, 5 + C) cx, cy, w, h in cells, objectness, classes; zeros where no object is."""
    batch, _, rows, columns = shape
    y_true = torch.zeros(batch, 3, rows, columns, 5 + num_classes)
    size = torch.tensor([columns, rows, columns, rows])
    for target in targets.cpu():
        box = target[2:] * size
        anchor = best_anchor(*(box[2:] * STRIDES[scale]).tolist())
        if anchor // 3 != scale or target[1] < 0:
            continue
        column = min(max(int(box[0]), 0), columns - 1)
        row = min(max(int(box[1]), 0), rows - 1)
        cell = y_true[int(target[0]), anchor % 3, row, column]
        cell[:4] = box
        cell[4] = 1
        cell[5 + int(target[1])] = 1
    return y_true.to(targets.device)


def decode_scale(prediction: Tensor, scale: int) -> Tensor:
    """(B, 3, H, W, 5 + C) raw -> (B, 3, H, W, 4) centre-size boxes in cells."""
    _, _, rows, columns, _ = prediction.shape
    grid_y, grid_x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    grid = torch.stack((grid_x, grid_y), dim=-1).to(prediction.device)
    anchors = torch.tensor(ANCHORS[3 * scale : 3 * scale + 3]).float() / STRIDES[scale]
    anchors = anchors.to(prediction.device).view(3, 1, 1, 2)
    centre = prediction[..., :2].sigmoid() + grid
    return torch.cat((centre, prediction[..., 2:4].exp() * anchors), dim=-1)


def find_ignored(boxes: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """(B, 3, H, W) bool: the predicted box overlaps a ground truth of its image enough."""
    batch, _, rows, columns, _ = boxes.shape
    ignored = torch.zeros(batch, 3, rows, columns, dtype=torch.bool, device=boxes.device)
    size = torch.tensor([columns, rows, columns, rows], device=boxes.device)
    for image in range(batch):
        truths = targets[targets[:, 0] == image][:, 2:] * size
        if len(truths):
            overlap = pairwise_overlap(truths, boxes[image].reshape(-1, 4)).amax(dim=0)
            ignored[image] = (overlap > threshold).view(3, rows, columns)
    return ignored


def reference_loss(
    outputs: Sequence[Tensor],
    targets: Tensor,
    num_classes: int,
    input_shape: tuple[int, int],
    *,
    focal_loss: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    label_smoothing: float = 0.0,
    ignore_threshold: float = 0.5,
) -> dict[str, Tensor]:
    """total, loc, conf, cls of YOLOLoss's defaults. Arguments as there; the anchors are fixed."""
    loc = conf = cls = outputs[0].sum() * 0
    for scale, output in enumerate(outputs):
        batch, _, rows, columns = output.shape
        prediction = output.view(batch, 3, 5 + num_classes, rows, columns)
        prediction = prediction.permute(0, 1, 3, 4, 2).contiguous()
        y_true = build_target(targets, scale, output.shape, num_classes)
        positive = y_true[..., 4] == 1
        boxes = decode_scale(prediction, scale)
        ignored = find_ignored(boxes.detach(), targets, ignore_threshold)

        if positive.any():
            loc = loc + 0.05 * (1 - ciou(boxes[positive], y_true[positive][:, :4])).mean()
            wanted = y_true[positive][:, 5:] * (1 - label_smoothing) + label_smoothing / 2
            bce = clamped_bce(prediction[positive][:, 5:].sigmoid(), wanted)
            cls = cls + bce.mean() * num_classes / 80

        probability = prediction[..., 4].sigmoid()
        losses = clamped_bce(probability, positive.float())
        if focal_loss:
            weight = torch.where(positive, alpha, 1 - alpha)
            ratio = torch.where(positive, 1 - probability, probability) ** gamma
            losses = losses * weight * ratio * 10
        factor = 5 * input_shape[0] * input_shape[1] / 416**2
        conf = conf + losses[positive | ~ignored].mean() * BALANCE[scale] * factor
    return {"total": loc + conf + cls, "loc": loc, "conf": conf, "cls": cls}
