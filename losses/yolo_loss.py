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
from losses.box_loss import BOX_LOSSES, box_loss, paired_iou
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


class Denominators(NamedTuple):
    """How many a mean is over, at least 1. Under torch.distributed the sums over ranks, divided by
    their number because DDP averages the gradients: the ranks' mean is the joint batch's loss.
    """

    counted: Tensor  # (3,) cells of each scale
    weights: Tensor  # (3,) of the positives
    all_positives: Tensor  # ()

    @classmethod
    def of(cls, counts: Tensor) -> "Denominators":
        """counts: (3, 3) float32, positives, their weights and counted cells of this rank."""
        counts = sum_over_ranks(counts)
        _, weights, counted = counts.clamp(min=1) / world_size()
        return cls(counted, weights, counts[0].sum().clamp(min=1) / world_size())


class _PickCells(torch.autograd.Function):
    """Objectness of every cell and whole cells of the candidates, from one scale's map.

    By plain indexing the backward pass fills two zero maps and adds them; here it fills one.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, *index: Tensor) -> tuple[Tensor, Tensor]:
        """raw: (B, H, W, 3, 5 + C), index: image, row, column, anchor of the cells to take."""
        ctx.save_for_backward(raw, *index)
        return raw[..., 4].flatten(1).float(), raw[index].float()

    @staticmethod
    def backward(ctx: Any, objectness: Tensor, picked: Tensor) -> tuple[Tensor | None, ...]:
        raw, *index = ctx.saved_tensors
        gradient = torch.zeros_like(raw)
        gradient[..., 4] = objectness.view(raw.shape[:-1])
        gradient.index_put_(tuple(index), picked.to(raw.dtype), accumulate=True)
        return gradient, *(None for _ in index)


class YOLOLoss(nn.Module):
    """The loss of YOLOv4's three raw maps, in float32; its defaults are the original fork's.

    anchors: nine (w, h) in pixels, small to large. input_shape: (height, width); it only sets
    the confidence factor 5 H W / 416^2. conf_loss, cls_loss: specs of
    `build_conf_loss` and `build_cls_loss`;
    focal_loss is shorthand for conf_loss="focal(alpha=..., gamma=...)". anchor_threshold: of the
    "iou_threshold" assigner. balance: confidence weights at strides 8, 16, 32.
    Raises UserError for a value that is not allowed.
    """

    anchors: Tensor
    strides: Tensor
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
        self.register_buffer("strides", torch.tensor(STRIDES).float(), persistent=False)
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
        """outputs: three (B, 3 * (5 + C), H/s, W/s) raw maps, targets: (N, 6), on one device.

        Returns float32 scalars: total = loc + conf + cls, each weighted and summed over scales;
        detached, for logs: positives and ignored (cells of this batch). `cells` adds "cells", the
        ConfCells, where gradients are taken "groups", their `group_sums`, and for a confidence
        loss with alpha="auto" "conf_alpha", as measured so far.
        Under torch.distributed this is a collective call: the denominators are sums over ranks.
        """
        self._check_outputs(outputs)
        if targets.ndim != 2 or targets.shape[1] != 6:
            raise UserError(
                f"targets have shape {tuple(targets.shape)}; give (N, 6): image index, class id, "
                "cx, cy, w, h, as data.dataset.collate makes them."
            )
        with torch.autocast(outputs[0].device.type, enabled=False):
            return self._terms(outputs, targets.float(), with_cells=cells)

    def _terms(
        self, outputs: Sequence[Tensor], targets: Tensor, *, with_cells: bool
    ) -> dict[str, Any]:
        maps = [raw.unflatten(1, (3, -1)).permute(0, 3, 4, 1, 2) for raw in outputs]
        sizes = [raw[0, ..., 0].numel() for raw in maps]
        candidates = place_candidates(
            targets,
            self.anchors,
            grids=[tuple(raw.shape[1:3]) for raw in maps],
            num_classes=self.num_classes,
            assigner=self.assigner,
            threshold=self.anchor_threshold,
            scale_xy=self.scale_xy,
        )
        images = targets[:, 0].long()
        objectness, predictions = _pick(maps, images, candidates)
        predicted = self._decode(predictions, candidates)
        truths = candidates.boxes_grid[:, :, None]
        iou = paired_iou(predicted.detach(), truths)
        positives = choose_positives(
            candidates,
            targets[:, 1],
            num_classes=self.num_classes,
            shape=(len(maps[0]), sum(sizes)),
            quality=self._alignment(predictions, targets[:, 1], iou),
        )
        counted = positives.mask | ~self._overlapping(maps, images, candidates)
        weights = positives.chosen.float()
        if positives.quality is not None:
            weights = weights * positives.quality
        by_scale = weights.sum((1, 2))
        if positives.quality is not None:
            by_scale = by_scale.sum().expand(3)  # one mean over all scales
        counts = (positives.chosen.sum((1, 2)), by_scale, _sum_by_scale(counted, sizes))
        denominators = Denominators.of(torch.stack(counts).float())

        loc = self._loc(predicted, truths, weights, denominators.weights)
        cls = self._cls(predictions[..., 5:], positives.classes, weights, denominators.weights)
        target = self._conf_target(iou, positives)
        losses = self._conf_losses(objectness, target, counted) * counted
        weights = self._conf_weights(denominators)
        conf = (weights * _sum_by_scale(losses, sizes)).sum()
        terms = {
            "total": loc + conf + cls,
            "loc": loc,
            "conf": conf,
            "cls": cls,
            "positives": counts[0].sum().float(),
            "ignored": (~counted).sum().float(),
        }
        if with_cells:
            weighted = losses.detach() * _by_cell(weights, sizes)
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

    def _decode(self, predictions: Tensor, candidates: Candidates) -> Tensor:
        """(3, N, A, >=4) raw -> (3, N, A, 4) cx, cy, w, h in cells of the scale."""
        offsets = torch.stack((candidates.columns, candidates.rows), dim=-1)
        anchors = self.anchors.view(3, 3, 2) / self.strides.view(3, 1, 1)
        scales = torch.arange(3, device=anchors.device).view(3, 1, 1)
        return torch.cat(
            decode_grid_boxes(
                predictions,
                offsets,
                anchors[scales, candidates.anchors],
                self.scales.view(3, 1, 1, 1),
            ),
            dim=-1,
        )

    @torch.no_grad()
    def _alignment(
        self, predictions: Tensor, class_ids: Tensor, iou: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """How well candidates detect their truth, score^a IoU^b, and the IoU, (3, N, A) each.

        None where the assigner does not ask.
        """
        if self.assigner != "aligned":
            return None
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

    def _loc(self, predicted: Tensor, truths: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        """The mean of each scale's positives, summed over scales."""
        losses = box_loss(self.box_loss, predicted, truths) * weights
        return self.loc_gain * (losses.sum((1, 2)) / sums).sum()

    def _cls(self, logits: Tensor, classes: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        """The mean over each scale's positives and classes, summed over scales, times C / 80."""
        target = classes * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = self.cls_loss(logits, target).sum(-1) * weights
        return self.cls_gain / 80 * (losses.sum((1, 2)) / sums).sum()

    def _conf_target(self, iou: Tensor, positives: Positives) -> Tensor:
        """(B, K): 0 for negatives; for positives 1, or mixed with the IoU of the predicted box."""
        if not self.iou_target:
            return positives.mask.float()
        quality = iou if positives.quality is None else positives.quality
        mixed = (1 - self.iou_target + self.iou_target * quality).clamp(MIN_IOU_TARGET, 1)
        target = iou.new_zeros(positives.mask.numel() + 1)
        target.scatter_(0, positives.cells.flatten(), mixed.flatten())
        return target[:-1].view_as(positives.mask)

    def _conf_losses(self, objectness: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        mask = (counted,) if self.conf_settings.wants_mask else ()
        return self.conf_loss(objectness, target, *mask)

    def _conf_weights(self, denominators: Denominators) -> Tensor:
        """(3,) what a cell's loss is multiplied by, with the normalizer that the loss declares."""
        weights = self.conf_settings.gain * self.balance
        if self.conf_settings.normalizer == "positives":
            return weights / denominators.all_positives
        return self.conf_factor * weights / denominators.counted

    def _check_outputs(self, outputs: Sequence[Tensor]) -> None:
        channels = 3 * (5 + self.num_classes)
        shapes = [tuple(raw.shape) for raw in outputs]
        batch, _, rows, columns = shapes[-1] if shapes and len(shapes[-1]) == 4 else (0, 0, 0, 0)
        if shapes != [(batch, channels, f * rows, f * columns) for f in (4, 2, 1)]:
            raise UserError(
                f"outputs have shapes {shapes}; {self.num_classes} classes need three maps of "
                f"{channels} channels, strides 8, 16, 32. Give the network the same num_classes."
            )


def _pick(maps: list[Tensor], images: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """(B, K) objectness of all cells and (3, N, A, 5 + C) candidates, raw, float32."""
    places = zip(maps, candidates.rows, candidates.columns, candidates.anchors, strict=True)
    picked = [_PickCells.apply(raw, images[:, None], *place) for raw, *place in places]
    objectness, predictions = zip(*picked, strict=True)
    return torch.cat(objectness, dim=1), torch.stack(predictions)


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
