"""Ground truth -> which anchor cells are positive, which are ignored; the rest are negative.

Every ground truth has A candidates at each of the three scales, three anchors in each of the cells
around its centre, so that shapes follow from N alone: what is not chosen is masked, never cut out,
and the device is never asked for a value.
A cell is numbered image * K + (its place in its image); K runs over strides 8, 16, 32, then
row, column, anchor. Class ids are -1 (ignore region) or 0..C-1: the data set reader checks that.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nets.decode import STRIDES

# Pairs of a ground truth and a predicted box that the ignore test holds at once. On a CPU a plane
# of a megabyte stays in the cache (2.6 ms for 2**20 pairs in all, 3.7 ms undivided); a GPU wants
# few launches, and five planes of 16 MiB are little there.
PAIRS_AT_ONCE = {"cpu": 2**18, "cuda": 2**22}

MAX_SHAPE_RATIO = 4.0  # "neighbours": an anchor suits sides up to so many times its own
TOP_K = 10  # "aligned": positives of a ground truth at most


class Candidates(NamedTuple):
    """Anchor cells that may be positive, (3 scales, N ground truths, A a scale); one may occur
    for several ground truths, never twice for one."""

    rows: Tensor  # int64
    columns: Tensor  # int64
    anchors_grid: Tensor  # (3, N, A, 2) w, h in cells of the scale
    wanted: Tensor  # bool; the others only keep the shape
    cells: Tensor  # int64 numbers, image * K + place
    in_map: Tensor  # int64 numbers in the map of the scale, (image, row, column, anchor)
    boxes_grid: Tensor  # (3, N, 4) ground truth: cx, cy, w, h in cells of the scale


class Positives(NamedTuple):
    """Candidates, (3 scales, N ground truths, A candidates), and the cells that they own.

    Where several ground truths meet in one cell one owns it; the others are not chosen.
    """

    chosen: Tensor  # (3, N, A) bool
    cells: Tensor  # (3, N, A) int64 cell; B * K, one behind the last, where not chosen
    classes: Tensor  # (3, N, A, C) 0 or 1
    mask: Tensor  # (B, K) bool
    quality: Tensor | None = None  # (3, N, A) objectness target of the chosen ones, 0..1


# Cells beside that of the centre, (rows down, columns right) in units of "towards the nearest"
OWN_CELL = ((0, 0),)
CROSS = ((0, 0), (0, 1), (1, 0))  # the nearest cell of the row and of the column: YOLOv5's
SQUARE = (*CROSS, (1, 1))  # and the one diagonal to the centre's


def _no_other(sizes_wh: Tensor, anchors_wh: Tensor, threshold: float) -> Tensor:
    """The original fork's rule."""
    return torch.zeros(len(sizes_wh), 9, dtype=torch.bool, device=sizes_wh.device)


def _iou_threshold(sizes_wh: Tensor, anchors_wh: Tensor, threshold: float) -> Tensor:
    """Every other anchor that fits better than the threshold: darknet's rule."""
    return anchor_overlap(sizes_wh, anchors_wh) > threshold


def _shape_ratio(sizes_wh: Tensor, anchors_wh: Tensor, threshold: float) -> Tensor:
    """Every other anchor whose sides are within a factor of 4: YOLOv5's rule."""
    ratio = sizes_wh[:, None] / anchors_wh
    return torch.maximum(ratio, 1 / ratio).amax(-1) < MAX_SHAPE_RATIO


def _any_anchor(sizes_wh: Tensor, anchors_wh: Tensor, threshold: float) -> Tensor:
    return torch.ones(len(sizes_wh), 9, dtype=torch.bool, device=sizes_wh.device)


# name -> (which of the nine anchors suit boxes of these sizes, besides the one that fits best,
# (N, 9); cells around the centre)
ASSIGNERS = {
    "best_anchor": (_no_other, OWN_CELL),
    "iou_threshold": (_iou_threshold, OWN_CELL),
    "neighbours": (_shape_ratio, CROSS),
    "aligned": (_any_anchor, SQUARE),
}


def anchor_overlap(sizes_wh: Tensor, anchors_wh: Tensor) -> Tensor:
    """IoU of boxes and anchors laid on one centre. (N, 2), (A, 2), one unit -> (N, A)."""
    intersection = torch.minimum(sizes_wh[:, None], anchors_wh).prod(-1)
    union = sizes_wh.prod(-1)[:, None] + anchors_wh.prod(-1) - intersection
    return intersection / union


def place_candidates(
    targets: Tensor,
    anchors: Tensor,
    *,
    grids: Sequence[tuple[int, int]],
    num_classes: int,
    assigner: str,
    threshold: float,
    scale_xy: Sequence[float] = (1.0, 1.0, 1.0),
) -> Candidates:
    """The cells around each ground truth's centre, at the anchors that suit its shape.

    Args:
        targets: (N, 6) float32 image, class, cx, cy, w, h, fractions of the input.
        anchors: (9, 2) pixels.
        grids: (rows, columns) of the three scales.
        assigner: One of ASSIGNERS.
        threshold: Of "iou_threshold" alone.
        scale_xy: A cell beside the centre's is a candidate only if it reaches the centre.
    """
    input_h, input_w = (STRIDES[0] * cells for cells in grids[0])
    sizes = torch.stack((targets[:, 4] * input_w, targets[:, 5] * input_h), dim=-1)
    suits, around = ASSIGNERS[assigner]
    known = (targets[:, 1:2] >= 0) & (targets[:, 1:2] < num_classes)
    best = anchor_overlap(sizes, anchors).argmax(dim=1, keepdim=True)  # the first of equals
    fits = suits(sizes, anchors, threshold) | (best == torch.arange(9, device=best.device))
    fits = (fits & known).view(-1, 3, 3).transpose(0, 1)
    rows, columns, usable, boxes_grid = _locate(targets, grids, around, scale_xy)
    anchor_ids = torch.arange(3, device=targets.device).expand(*rows.shape, 3)
    of_scale = [anchors[3 * i : 3 * i + 3] / stride for i, stride in enumerate(STRIDES)]
    anchors_grid = torch.stack(of_scale)[:, None, None].expand(*anchor_ids.shape, 2)
    image = targets[:, :1, None].long()
    in_scale = [3 * height * width for height, width in grids]  # cells of an image
    in_map, cells = [], []
    for scale, (_, width) in enumerate(grids):
        place = 3 * (rows[scale] * width + columns[scale])[..., None] + anchor_ids[scale]
        in_map.append(place + in_scale[scale] * image)
        cells.append(place + sum(in_scale[:scale]) + sum(in_scale) * image)
    return Candidates(
        rows=rows[..., None].expand_as(anchor_ids).flatten(2),
        columns=columns[..., None].expand_as(anchor_ids).flatten(2),
        anchors_grid=anchors_grid.flatten(2, 3),
        wanted=(usable[..., None] & fits[:, :, None]).flatten(2),
        cells=torch.stack(cells).flatten(2),
        in_map=torch.stack(in_map).flatten(2),
        boxes_grid=boxes_grid,
    )


def choose_positives(
    candidates: Candidates,
    class_ids: Tensor,
    *,
    num_classes: int,
    shape: tuple[int, int],
    quality: tuple[Tensor, Tensor] | None = None,
) -> Positives:
    """Which candidates are positive: all that are wanted, or with `quality` each truth's best.

    Args:
        class_ids: (N,).
        shape: Images and cells of an image, (B, K).
        quality: Alignment and IoU of the predicted boxes, (3, N, A) each, for "aligned".
    """
    total = shape[0] * shape[1]
    wanted, target = candidates.wanted, None
    if quality is not None:
        wanted, target = _best_aligned(candidates, *quality, total=total)
    truths = torch.arange(len(class_ids), device=class_ids.device)[:, None]
    # The last ground truth in each cell, -1 for none; the entry behind the last cell takes what is
    # not wanted. A maximum: which of two writes to one place wins is undefined on a GPU.
    owner = torch.full((total + 1,), -1, dtype=torch.int64, device=class_ids.device)
    cells = torch.where(wanted, candidates.cells, total)
    owner.scatter_reduce_(0, cells.flatten(), truths.expand_as(cells).flatten(), "amax")
    chosen = wanted & (owner[candidates.cells] == truths)
    return Positives(
        chosen=chosen,
        cells=torch.where(chosen, candidates.cells, total),
        classes=_class_bits(class_ids.long(), candidates, wanted, chosen, num_classes, total),
        mask=(owner[:-1] >= 0).view(shape),
        quality=target,
    )


def _best_aligned(
    candidates: Candidates, alignment: Tensor, iou: Tensor, *, total: int
) -> tuple[Tensor, Tensor]:
    """The TOP_K of each truth by alignment, each cell with its best truth, and their targets:
    alignment scaled so that a truth's best has its best IoU (TOOD, Feng et al. 2021)."""
    alignment = torch.where(candidates.wanted, alignment, 0)
    flat = alignment.transpose(0, 1).flatten(1)
    best = flat.topk(min(TOP_K, flat.shape[1]), dim=1)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best.indices, best.values > 0)
    chosen = chosen.unflatten(1, (3, -1)).transpose(0, 1)
    cells = torch.where(chosen, candidates.cells, total)
    of_cell = alignment.new_zeros(total + 1)
    of_cell.scatter_reduce_(0, cells.flatten(), alignment.flatten(), "amax")
    chosen = chosen & (alignment >= of_cell[candidates.cells])
    highest = torch.where(chosen, alignment, 0).amax((0, 2), keepdim=True)
    best_iou = torch.where(chosen, iou, 0).amax((0, 2), keepdim=True)
    tiny = torch.finfo(alignment.dtype).tiny
    return chosen, alignment / highest.clamp(min=tiny) * best_iou


def _locate(
    targets: Tensor,
    grids: Sequence[tuple[int, int]],
    around: Sequence[tuple[int, int]],
    scale_xy: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(3, N, cells) row and column of each centre's cell and those around it, whether they are
    candidates, and (3, N, 4) boxes, in cells of each scale.

    A centre on the right or bottom border belongs to the last cell.
    """
    cx, cy, w, h = targets[:, 2:].unbind(-1)
    found = []
    for (height, width), scale in zip(grids, scale_xy, strict=True):
        row, near_row = _nearest(cy * height, [down for down, _ in around], height, scale)
        column, near_column = _nearest(cx * width, [right for _, right in around], width, scale)
        boxes = torch.stack((cx * width, cy * height, w * width, h * height), dim=-1)
        found.append((row, column, near_row & near_column, boxes))
    rows, columns, usable, boxes_grid = map(torch.stack, zip(*found, strict=True))
    return rows, columns, usable, boxes_grid


def _nearest(
    centre: Tensor, steps: Sequence[int], cells: int, scale: float
) -> tuple[Tensor, Tensor]:
    """One axis: (N, steps) the cell of each centre for a step of 0, the nearest beside it for 1;
    and whether that is inside the image and a prediction there can reach the centre."""
    own = centre.long().clamp(0, cells - 1)
    beside = own + torch.where(centre - own < 0.5, -1, 1)
    inside = (beside >= 0) & (beside < cells)
    reaches = inside & ((centre - beside - 0.5).abs() <= scale / 2)
    beside, always = beside.clamp(0, cells - 1), torch.ones_like(inside)
    place = torch.stack([beside if step else own for step in steps], dim=-1)
    return place, torch.stack([reaches if step else always for step in steps], dim=-1)


def _class_bits(
    class_ids: Tensor,
    candidates: Candidates,
    wanted: Tensor,
    chosen: Tensor,
    num_classes: int,
    total: int,
) -> Tensor:
    """(3, N, A, C): each wanted candidate adds its class to the row of its cell's owner."""
    rows = wanted.numel()
    row = torch.arange(rows, device=wanted.device)
    row_of_cell = torch.full((total + 1,), rows, device=wanted.device)
    owned = torch.where(chosen, candidates.cells, total)
    row_of_cell.scatter_(0, owned.flatten(), row)
    row_of_cell[total:].fill_(rows)  # an assignment would copy the number to a GPU
    place = row_of_cell[candidates.cells] * num_classes + class_ids[:, None]
    place = torch.where(wanted, place, rows * num_classes)
    bits = torch.zeros(rows * num_classes + 1, device=wanted.device)
    bits.scatter_(0, place.flatten(), 1.0)
    return bits[:-1].view(*wanted.shape, num_classes)


@torch.no_grad()
def overlaps_truth(
    corners: Tensor, truths_xyxy: Tensor, images: Tensor, *, threshold: float
) -> Tensor:
    """Whether a predicted box has IoU > threshold with any ground truth of its own image.

    Args:
        corners: (4, B, K) x1, y1, x2, y2 of the predicted boxes.
        truths_xyxy: (N, 4), in the same unit.
        images: (N,) int64 image of each ground truth.

    Returns:
        (B, K) bool.
    """
    # IoU > t  <=>  (1 + t) intersection - t truth_area > t predicted_area: no division, and the
    # right side, being one for all ground truths of an image, is compared only once.
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
