"""Ground truth -> which anchor cells are positive, which are ignored; the rest are negative.

Every ground truth is a candidate at all three scales, at A anchors each, so that shapes follow from
N alone: what is not chosen is masked, never cut out, and the device is never asked for a value.
A cell is numbered image * K + (its place in its picture); K runs over strides 8, 16, 32, then
row, column, anchor. Class ids are -1 (ignore region) or 0..C-1: the data set reader checks that.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.decode import STRIDES

# Pairs of a ground truth and a predicted box that the ignore test holds at once. On a CPU a plane
# of a megabyte stays in the cache (2.6 ms for 2**20 pairs in all, 3.7 ms undivided); a GPU wants
# few launches, and five planes of 16 MiB are little there.
PAIRS_AT_ONCE = {"cpu": 2**18, "cuda": 2**22}


class Positives(NamedTuple):
    """Candidates, (3 scales, N ground truths, A anchors), and the cells that they own.

    Where several ground truths meet in one cell the last owns it; the others are not chosen.
    """

    chosen: Tensor  # (3, N, A) bool
    cells: Tensor  # (3, N, A) int64 cell; B * K, one behind the last, where not chosen
    anchors: Tensor  # (N, A) int64 0..2, of the scale's three
    rows: Tensor  # (3, N) int64
    columns: Tensor  # (3, N) int64
    boxes_grid: Tensor  # (3, N, 4) cx, cy, w, h in cells of the scale
    classes: Tensor  # (3, N, A, C) 0 or 1; an owner has the classes of all that met in its cell
    mask: Tensor  # (B, K) bool


def _best_anchor(overlap: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The one anchor of best fit, the first of equals: the original fork's rule. A = 1."""
    best = overlap.argmax(dim=1, keepdim=True)
    scales = torch.arange(3, device=overlap.device)[:, None, None]
    return best % 3, best // 3 == scales


def _iou_threshold(overlap: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The best anchor, and every other that fits better than the threshold: darknet's. A = 3."""
    anchors = torch.arange(9, device=overlap.device)
    wanted = (anchors == overlap.argmax(dim=1, keepdim=True)) | (overlap > threshold)
    return anchors[:3].expand(len(overlap), 3), wanted.unflatten(1, (3, 3)).transpose(0, 1)


# name -> function of the (N, 9) overlap with the anchors and of anchor_threshold: which anchors of
# a scale may be wanted, (N, A), and which are, (3, N, A)
ASSIGNERS = {"best_anchor": _best_anchor, "iou_threshold": _iou_threshold}


def anchor_overlap(sizes_wh: Tensor, anchors_wh: Tensor) -> Tensor:
    """IoU of boxes and anchors laid on one centre. (N, 2), (A, 2), one unit -> (N, A)."""
    intersection = torch.minimum(sizes_wh[:, None], anchors_wh).prod(-1)
    union = sizes_wh.prod(-1)[:, None] + anchors_wh.prod(-1) - intersection
    return intersection / union


def assign(
    targets: Tensor,
    anchors: Tensor,
    *,
    grids: Sequence[tuple[int, int]],
    batch_size: int,
    num_classes: int,
    assigner: str,
    threshold: float,
) -> Positives:
    """Find the positives of a batch.

    targets: (N, 6) float32 image, class, cx, cy, w, h, fractions of the input. anchors: (9, 2)
    pixels. grids: (rows, columns) of the three scales. threshold: of "iou_threshold" alone.
    """
    input_h, input_w = (STRIDES[0] * cells for cells in grids[0])
    sizes = torch.stack((targets[:, 4] * input_w, targets[:, 5] * input_h), dim=-1)
    anchor_ids, wanted = ASSIGNERS[assigner](anchor_overlap(sizes, anchors), threshold)
    known = (targets[:, 1:2] >= 0) & (targets[:, 1:2] < num_classes)
    wanted = wanted & known
    rows, columns, boxes_grid = _locate(targets, grids)
    first, per_image = _number_cells(rows, columns, grids)
    cells = first[..., None] + anchor_ids + per_image * targets[:, :1].long()
    total = per_image * batch_size
    owner = _owners(torch.where(wanted, cells, total), total)
    truths = torch.arange(len(targets), device=targets.device)[:, None]
    owner_of_cell = owner[cells]
    chosen = wanted & (owner_of_cell == truths)
    return Positives(
        chosen=chosen,
        cells=torch.where(chosen, cells, total),
        anchors=anchor_ids,
        rows=rows,
        columns=columns,
        boxes_grid=boxes_grid,
        classes=_class_bits(targets[:, 1].long(), owner_of_cell, wanted, num_classes),
        mask=(owner[:-1] >= 0).view(batch_size, -1),
    )


def _locate(targets: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(3, N) row and column of each centre, and (3, N, 4) boxes, in cells of each scale.

    A centre on the right or bottom border belongs to the last cell.
    """
    cx, cy, w, h = targets[:, 2:].unbind(-1)
    rows = [(cy * height).long().clamp(0, height - 1) for height, _ in grids]
    columns = [(cx * width).long().clamp(0, width - 1) for _, width in grids]
    boxes = [
        torch.stack((cx * width, cy * height, w * width, h * height), dim=-1)
        for height, width in grids
    ]
    return torch.stack(rows), torch.stack(columns), torch.stack(boxes)


def _number_cells(
    rows: Tensor, columns: Tensor, grids: Sequence[tuple[int, int]]
) -> tuple[Tensor, int]:
    """(3, N) the first anchor's cell in a picture at each row and column, and K."""
    first, start = [], 0
    for scale, (height, width) in enumerate(grids):
        first.append(start + 3 * (rows[scale] * width + columns[scale]))
        start += 3 * height * width
    return torch.stack(first), start


def _owners(cells: Tensor, total: int) -> Tensor:
    """(total + 1) int64: the last ground truth in each cell, -1 for none; the final entry takes
    the candidates that are not wanted.

    A maximum, not a plain scatter: which of two writes to one place wins is undefined on a GPU.
    """
    truths = torch.arange(cells.shape[1], device=cells.device)[:, None].expand_as(cells)
    owner = torch.full((total + 1,), -1, dtype=torch.int64, device=cells.device)
    return owner.scatter_reduce_(0, cells.flatten(), truths.flatten(), "amax")


def _class_bits(
    class_ids: Tensor, owner_of_cell: Tensor, wanted: Tensor, num_classes: int
) -> Tensor:
    """(3, N, A, C): each wanted candidate adds its class to the row of its cell's owner."""
    scales, count, anchors = wanted.shape
    row = torch.arange(scales, device=wanted.device)[:, None, None] * count + owner_of_cell
    row = row * anchors + torch.arange(anchors, device=wanted.device)
    rows = wanted.numel()
    bits = torch.zeros(rows * num_classes + 1, device=wanted.device)
    place = torch.where(wanted, row * num_classes + class_ids[:, None], rows * num_classes)
    bits.scatter_(0, place.flatten(), 1.0)
    return bits[:-1].view(scales, count, anchors, num_classes)


@torch.no_grad()
def overlaps_truth(
    corners: Tensor, truths_xyxy: Tensor, images: Tensor, *, threshold: float
) -> Tensor:
    """Whether a predicted box has IoU > threshold with any ground truth of its own picture.

    corners: (4, B, K) x1, y1, x2, y2 of the predicted boxes, truths_xyxy: (N, 4), in one unit.
    images: (N,) int64 picture of each ground truth. Returns (B, K) bool.
    """
    # IoU > t  <=>  (1 + t) intersection - t truth_area > t predicted_area: no division, and the
    # right side, being one for all ground truths of a picture, is compared only once.
    x1, y1, x2, y2 = corners
    excess = torch.zeros_like(x1)
    chunk = max(1, PAIRS_AT_ONCE.get(x1.device.type, 2**22) // x1.shape[1])
    for truths, image in zip(truths_xyxy.split(chunk), images.split(chunk), strict=True):
        left, top, right, bottom = truths[..., None].unbind(1)
        width = x2.index_select(0, image).clamp_(max=right)
        width -= x1.index_select(0, image).clamp_(min=left)
        height = y2.index_select(0, image).clamp_(max=bottom)
        height -= y1.index_select(0, image).clamp_(min=top)
        # Apart on the y axis the product is negative instead of 0, which compares alike.
        truth_area = (right - left) * (bottom - top)
        width.clamp_(min=0)
        pair = torch.addcmul(-threshold * truth_area, width, height, value=1 + threshold)
        excess.scatter_reduce_(0, image[:, None].expand_as(pair), pair, "amax")
    return excess > threshold * (x2 - x1) * (y2 - y1)
