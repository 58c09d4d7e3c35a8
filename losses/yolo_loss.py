"""YOLOLoss: boxes to anchor cells, then location + confidence + class."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from losses.assign import (
    ASSIGNERS,
    Candidates,
    Positives,
    choose_positives,
    overlaps_truth,
    place_candidates,
)
from losses.box_loss import BOX_LOSSES, box_losses
from losses.class_loss import build_cls_loss
from losses.conf import build_conf_loss, conf_settings
from losses.conf.alpha import MeasuredAlpha
from losses.conf.cells import ConfCells, group_sums
from losses.conf.registry import check_argument
from losses.conf.spec import conf_loss_spec
from nets.decode import STRIDES, decode_grid_boxes, grid_offsets
from utils.distributed import sum_over_ranks, world_size
from utils.errors import UserError

ALIGNMENT = (0.5, 6.0)  # exponents of score and IoU in "aligned": TOOD's with the detection score
MIN_IOU_TARGET = 1e-3  # a positive's target stays above 0, which would make it a negative


class Matched(NamedTuple):
    """The network's answer and what it should have been, for (3, N, A) candidates, (B, K) cells."""

    positives: Positives
    objectness: Tensor  # (B, K) logits
    counted: Tensor  # (B, K) bool; the others are ignored
    classes: Tensor  # (3, N, A, C) logits
    loc_losses: Tensor  # (3, N, A)
    iou: Tensor  # (3, N, A) of predicted box and truth, detached
    sizes: list[int]  # cells of each scale in an image


class _PickCells(torch.autograd.Function):
    """Objectness of every cell, (B, K), and the candidates' cells, (3, N, A, 5 + C), as float32.

    By plain indexing the backward pass fills two zero maps per scale and adds them; here it fills
    one. In channels_last memory, as the trainer's maps are, a map is a list of cells, and
    index_add_ needs no sorting on a GPU, as index_put_ does.
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """index: (3, N, A) cells of the candidates, numbered in each of the three maps;
        maps: (B, H, W, 3, 5 + C)."""
        ctx.save_for_backward(index, *maps)
        objectness = torch.cat([raw[..., 4].flatten(1) for raw in maps], dim=1)
        picked = [
            raw.flatten(0, 3)[own] if raw.is_contiguous() else raw[_place(own, raw.shape)]
            for own, raw in zip(index, maps, strict=True)
        ]
        return objectness.float(), torch.stack(picked).float()

    @staticmethod
    def backward(ctx: Any, objectness: Tensor, picked: Tensor) -> tuple[Tensor | None, ...]:
        index, *maps = ctx.saved_tensors
        parts = objectness.split([raw[0, ..., 0].numel() for raw in maps], dim=1)
        gradients = [torch.zeros_like(raw) for raw in maps]
        for gradient, part, own, cells in zip(gradients, parts, index, picked, strict=True):
            gradient[..., 4] = part.view(gradient.shape[:-1])
            cells = cells.to(gradient.dtype)
            if gradient.is_contiguous():
                gradient.flatten(0, 3).index_add_(0, own.flatten(), cells.flatten(0, 1))
            else:
                gradient.index_put_(_place(own, gradient.shape), cells, accumulate=True)
        return None, *gradients


def _place(number: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Image, row, column and anchor of cells numbered in a map of (B, H, W, 3, 5 + C).

    torch.unravel_index would copy the shape to a GPU.
    """
    _, height, width, anchors, _ = shape
    column = number // anchors
    row = column // width
    return row // height, row % height, column % width, number % anchors


class YOLOLoss(nn.Module):
    """The loss of YOLOv4's three raw maps, in float32; its defaults are the original fork's.

    Args:
        anchors: Nine (w, h) in pixels, small to large.
        input_shape: (height, width); it only sets the confidence factor 5 H W / 416^2.
        focal_loss: Shorthand for conf_loss="focal(alpha=..., gamma=...)".
        conf_loss, cls_loss: Specs of `build_conf_loss` and `build_cls_loss`.
        label_smoothing: e of the class targets y (1 - e) + e / 2.
        anchor_threshold: Of the "iou_threshold" assigner.
        balance: Confidence weights at strides 8, 16, 32.
        iou_target: A positive's objectness target is 1 - this + this times its IoU.

    Raises:
        UserError: For a value that is not allowed.
    """

    anchors: Tensor
    scales: Tensor
    balance: Tensor

    def __init__(
        self,
        anchors: Sequence[Sequence[float]],
        num_classes: int,
        input_shape: tuple[int, int],
        *,
        focal_loss: bool = False,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        conf_loss: str = "",
        cls_loss: str = "bce",
        box_loss: str = "ciou",
        label_smoothing: float = 0.0,
        assigner: str = "best_anchor",
        anchor_threshold: float = 0.213,
        ignore_threshold: float = 0.5,
        scale_xy: Sequence[float] = (1.0, 1.0, 1.0),
        balance: tuple[float, float, float] = (4.0, 1.0, 0.4),
        loc_gain: float = 0.05,
        cls_gain: float = 1.0,
        iou_target: float = 0.0,
    ):
        super().__init__()
        _check_choice("box_loss", box_loss, BOX_LOSSES)
        _check_choice("assigner", assigner, ASSIGNERS)
        fractions = {"label_smoothing": label_smoothing, "anchor_threshold": anchor_threshold}
        fractions |= {"ignore_threshold": ignore_threshold, "iou_target": iou_target}
        for name, value in fractions.items():
            check_argument(name, value, 0 <= value <= 1, "0 to 1")
        check_argument("num_classes", num_classes, num_classes >= 1, "1 or more")
        for name, gain in (("loc_gain", loc_gain), ("cls_gain", cls_gain)):
            check_argument(name, gain, 0 <= gain <= 1e6, "0 to 1e6")
        self.num_classes, self.box_loss, self.assigner = num_classes, box_loss, assigner
        self.label_smoothing, self.anchor_threshold = label_smoothing, anchor_threshold
        self.ignore_threshold = ignore_threshold
        self.loc_gain, self.cls_gain = loc_gain, cls_gain
        self.scale_xy = _three("scale_xy", scale_xy)
        self.register_buffer("anchors", _anchor_tensor(anchors), persistent=False)
        self.register_buffer("scales", torch.tensor(self.scale_xy), persistent=False)
        self.register_buffer("balance", torch.tensor(_three("balance", balance)), persistent=False)
        self.conf_factor = 5 * input_shape[0] * input_shape[1] / 416**2
        self.conf_loss = build_conf_loss(
            conf_loss_spec(conf_loss, focal_loss, focal_alpha, focal_gamma)
        )
        self.conf_settings = conf_settings(self.conf_loss)
        self.iou_target = 1.0 if self.conf_settings.wants_iou else iou_target
        self.prior_pi = self.conf_settings.prior_pi
        self.cls_loss = build_cls_loss(cls_loss, label_smoothing)

    def forward(
        self, outputs: Sequence[Tensor], targets: Tensor, *, cells: bool = False
    ) -> dict[str, Any]:
        """The loss of a batch. Under torch.distributed a collective call: denominators are sums.

        Args:
            outputs: Three (B, 3 * (5 + C), H/s, W/s) raw maps, strides 8, 16, 32.
            targets: (N, 6) image, class, cx, cy, w, h (fractions), on the same device.
            cells: Also look at the confidence loss cell by cell.

        Returns:
            float32 scalars: total = loc + conf + cls, each weighted and summed over scales;
            detached, for logs: positives and ignored (cells of this batch). `cells` adds "cells",
            the ConfCells, where gradients are taken "groups", their `group_sums`, and for a
            confidence loss with alpha="auto" "conf_alpha", as measured so far.
        """
        channels = 3 * (5 + self.num_classes)
        shapes = [tuple(raw.shape) for raw in outputs]
        batch, _, rows, columns = shapes[-1] if shapes and len(shapes[-1]) == 4 else (0, 0, 0, 0)
        if shapes != [(batch, channels, f * rows, f * columns) for f in (4, 2, 1)]:
            raise UserError(
                f"outputs have shapes {shapes}; {self.num_classes} classes need three maps of "
                f"{channels} channels, strides 8, 16, 32. Give the network the same num_classes."
            )
        if targets.ndim != 2 or targets.shape[1] != 6:
            raise UserError(
                f"targets have shape {tuple(targets.shape)}; give (N, 6): image index, class id, "
                "cx, cy, w, h, as data.loader.collate makes them."
            )
        with torch.autocast(outputs[0].device.type, enabled=False):
            maps = [raw.unflatten(1, (3, -1)).permute(0, 3, 4, 1, 2) for raw in outputs]
            return self._terms(self._match(maps, targets.float()), with_cells=cells)

    def _match(self, maps: list[Tensor], targets: Tensor) -> Matched:
        """Which cells are to find which object, and how well their boxes fit so far.

        maps: (B, H, W, 3, 5 + C).
        """
        candidates = place_candidates(
            targets,
            self.anchors,
            grids=[(raw.shape[1], raw.shape[2]) for raw in maps],
            num_classes=self.num_classes,
            assigner=self.assigner,
            threshold=self.anchor_threshold,
            scale_xy=self.scale_xy,
        )
        objectness, predictions = _PickCells.apply(candidates.in_map, *maps)
        predicted = torch.cat(
            decode_grid_boxes(
                predictions,
                torch.stack((candidates.columns, candidates.rows), dim=-1),
                candidates.anchors_grid,
                self.scales.view(3, 1, 1, 1),
            ),
            dim=-1,
        )
        truths = candidates.boxes_grid[:, :, None]
        loc_losses, iou = box_losses(self.box_loss, predicted, truths)
        quality = None
        if self.assigner == "aligned":
            quality = self._alignment(predictions, targets[:, 1], iou.detach())
        positives = choose_positives(
            candidates,
            targets[:, 1],
            num_classes=self.num_classes,
            shape=objectness.shape,
            quality=quality,
        )
        ignored = self._overlapping(maps, targets[:, 0].long(), candidates)
        counted = positives.mask | ~ignored
        sizes = [raw[0, ..., 0].numel() for raw in maps]
        classes = predictions[..., 5:]
        return Matched(positives, objectness, counted, classes, loc_losses, iou.detach(), sizes)

    def _terms(self, matched: Matched, *, with_cells: bool) -> dict[str, Any]:
        """The losses of all cells, weighted and summed over the scales."""
        positives, objectness, counted, classes, loc_losses, iou, sizes = matched
        weights = positives.chosen.float()
        if positives.quality is not None:
            weights = weights * positives.quality
        of_scale = weights.sum((1, 2))
        if positives.quality is not None:
            of_scale = of_scale.sum().expand(3)  # one mean over all scales
        counts = (positives.chosen.sum((1, 2)), of_scale, _sum_by_scale(counted, sizes))
        # Under torch.distributed: sums over ranks, divided by their number because DDP averages
        # the gradients, so that the ranks' mean is the loss of the joint batch.
        sums = sum_over_ranks(torch.stack(counts).float())
        _, per_scale, counted_cells = sums.clamp(min=1) / world_size()

        loc = self.loc_gain * ((loc_losses * weights).sum((1, 2)) / per_scale).sum()
        named = positives.classes * (1 - self.label_smoothing) + self.label_smoothing / 2
        cls_losses = self.cls_loss(classes, named).sum(-1) * weights
        cls = self.cls_gain / 80 * (cls_losses.sum((1, 2)) / per_scale).sum()

        target = self._conf_target(iou, positives)
        mask = (counted,) if self.conf_settings.wants_mask else ()
        conf_losses = self.conf_loss(objectness, target, *mask) * counted
        gains = self.conf_settings.gain * self.balance
        if self.conf_settings.normalizer == "positives":
            gains = gains / (sums[0].sum().clamp(min=1) / world_size())
        else:
            gains = self.conf_factor * gains / counted_cells
        conf = (gains * _sum_by_scale(conf_losses, sizes)).sum()

        terms = {"total": loc + conf + cls, "loc": loc, "conf": conf, "cls": cls}
        terms |= {"positives": counts[0].sum().float(), "ignored": (~counted).sum().float()}
        if with_cells:
            weighted = conf_losses.detach() * _by_cell(gains, sizes)
            seen = ConfCells(objectness, target, positives.mask, counted, weighted, sizes)
            terms |= self._look(seen, conf)
        return terms

    def _look(self, cells: ConfCells, conf: Tensor) -> dict[str, Any]:
        """What a look at the cells adds to the terms."""
        seen: dict[str, Any] = {"cells": cells}
        if conf.requires_grad and cells.objectness.requires_grad:
            seen["groups"] = group_sums(cells, conf)
        for module in self.conf_loss.modules():
            if isinstance(module, MeasuredAlpha):
                seen["conf_alpha"] = module.alpha.float()
        return seen

    @torch.no_grad()
    def _alignment(
        self, predictions: Tensor, class_ids: Tensor, iou: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How well candidates detect their truth, score^a IoU^b, and the IoU, (3, N, A) each."""
        place = class_ids.long().clamp(0, self.num_classes - 1)[:, None, None]
        named = predictions[..., 5:].gather(-1, place.expand(*iou.shape, 1))[..., 0]
        score = predictions[..., 4].sigmoid() * named.sigmoid()
        return score ** ALIGNMENT[0] * iou.clamp(min=0) ** ALIGNMENT[1], iou

    @torch.no_grad()
    def _overlapping(self, maps: list[Tensor], images: Tensor, candidates: Candidates) -> Tensor:
        """(B, K) bool: boxes that overlap a ground truth of their image too well to be wrong."""
        corners = []
        for scale, raw in enumerate(maps):
            rows, columns = raw.shape[1:3]
            offsets = grid_offsets(rows, columns, raw.device)[:, :, None]
            anchors = self.anchors[3 * scale : 3 * scale + 3] / STRIDES[scale]
            logits = raw[..., :4].float()
            centre, size = decode_grid_boxes(logits, offsets, anchors, self.scale_xy[scale])
            half = size / 2
            edges = (centre - half, centre + half)
            planes = [edge.permute(4, 0, 1, 2, 3).flatten(2) for edge in edges]
            corners.append(torch.cat(planes) * STRIDES[scale])
        truths_xyxy = box_convert(candidates.boxes_grid[0] * STRIDES[0], "cxcywh", "xyxy")
        return overlaps_truth(
            torch.cat(corners, dim=2), truths_xyxy, images, threshold=self.ignore_threshold
        )

    def _conf_target(self, iou: Tensor, positives: Positives) -> Tensor:
        """(B, K): 0 for negatives; for positives 1, or mixed with the IoU of the predicted box."""
        if not self.iou_target:
            return positives.mask.float()
        quality = iou if positives.quality is None else positives.quality
        mixed = (1 - self.iou_target + self.iou_target * quality).clamp(MIN_IOU_TARGET, 1)
        target = iou.new_zeros(positives.mask.numel() + 1)
        target.scatter_(0, positives.cells.flatten(), mixed.flatten())
        return target[:-1].view_as(positives.mask)


def _sum_by_scale(values: Tensor, sizes: list[int]) -> Tensor:
    """(B, K) -> (3,)."""
    return torch.stack([part.sum() for part in values.split(sizes, dim=1)])


def _by_cell(values: Tensor, sizes: list[int]) -> Tensor:
    """(3,) -> (K,): every cell has its scale's value."""
    return torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])


def _anchor_tensor(anchors: Sequence[Sequence[float]]) -> Tensor:
    tensor = torch.as_tensor(anchors, dtype=torch.float32)
    if tensor.shape != (9, 2) or not (tensor > 0).all():
        raise UserError(f"anchors must be nine (w, h) of positive pixels, given {anchors}.")
    return tensor


def _three(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != 3:
        raise UserError(f"{name} is {values}. Give three numbers, for strides 8, 16, 32.")
    return tuple(float(value) for value in values)


def _check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} {value!r} is unknown. Allowed: {', '.join(allowed)}.")
