"""What the confidence loss does to the cells: shares of easy and hard ones, and their curve."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

HARD_OBJECTNESS = 0.1  # a negative above it is a hard one
GROUPS = ("positive", "easy", "hard", "ignored")  # easy and hard are negatives
VALUES = ("loss", "gradient", "objectness", "cells")
LOGIT_RANGE, BIN_WIDTH = 14.0, 0.05  # of CellHistogram; float32 tells |t - p| no finer than that


class ConfCells(NamedTuple):
    """All cells of a batch as the confidence loss sees them, (B, K) each.

    losses: detached, with every weight of the term, 0 where ignored: their sum is the term.
    """

    objectness: Tensor  # logits
    targets: Tensor
    positive: Tensor  # bool
    counted: Tensor  # bool; the others are ignored
    losses: Tensor
    sizes: list[int]  # cells of an image at strides 8, 16, 32; their sum is K


def group_sums(cells: ConfCells, conf: Tensor) -> Tensor:
    """(3, 4, 4) float32 sums by scale, GROUPS and VALUES; gradient is |d conf / d logit|.

    conf: the confidence term with its graph, which stays usable.
    """
    (gradient,) = torch.autograd.grad(
        conf, cells.objectness, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        objectness = cells.objectness.sigmoid()
        negative, hard = cells.counted & ~cells.positive, objectness > HARD_OBJECTNESS
        groups = (cells.positive, negative & ~hard, negative & hard, ~cells.counted)
        values = (cells.losses, gradient.abs(), objectness, torch.ones_like(objectness))
        masks, columns = torch.stack(groups).float(), torch.stack(values)
        parts = zip(masks.split(cells.sizes, -1), columns.split(cells.sizes, -1), strict=True)
        return torch.stack([torch.einsum("gbk,vbk->gv", mask, part) for mask, part in parts])


class CellHistogram:
    """Cells and their loss over difficulty |target - p|, for curves from easy to hard.

    Bins are equally wide in the logit of the difficulty: .99 and .999 differ, and so do .01 and
    .001, where nearly all negatives lie. counts, losses: (2, bins), positives and negatives.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        bins = round(2 * LOGIT_RANGE / BIN_WIDTH)
        self.counts = torch.zeros(2, bins, dtype=torch.float64, device=device)
        self.losses = torch.zeros_like(self.counts)

    @torch.no_grad()
    def add(self, cells: ConfCells) -> None:
        """Take in a batch; ignored cells are left out."""
        bins = self.counts.shape[1]
        offset = (_difficulty_logit(cells) + LOGIT_RANGE) / BIN_WIDTH
        index = offset.nan_to_num(0).clamp(0, bins - 1).long() + bins * ~cells.positive
        weights = cells.counted.double().flatten()
        self.counts.view(-1).index_add_(0, index.flatten(), weights)
        self.losses.view(-1).index_add_(0, index.flatten(), cells.losses.double().flatten())

    def to_json(self) -> dict[str, Any]:
        """Plain lists: the bins' difficulty, and cells and loss in each, for both groups."""
        bins = self.counts.shape[1]
        middle = (torch.arange(bins) + 0.5) * BIN_WIDTH - LOGIT_RANGE
        groups = {
            name: {"cells": self.counts[row].tolist(), "loss": self.losses[row].tolist()}
            for row, name in enumerate(("positive", "negative"))
        }
        return {"difficulty": middle.double().sigmoid().tolist(), **groups}


def _difficulty_logit(cells: ConfCells) -> Tensor:
    """logit(|target - p|), from the logit itself where the target is 0 or 1: no rounding there."""
    z, t = cells.objectness, cells.targets
    between = (t - z.sigmoid()).abs().logit(eps=1e-6)
    return torch.where(t == 0, z, torch.where(t == 1, -z, between))
