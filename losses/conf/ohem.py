"""The hardest negatives alone."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.conf.registry import check_argument, conf_loss
from losses.focal import upcast


@conf_loss("ohem")
class OHEM(nn.Module):
    """BCE over positives and the hardest ratio times as many negatives; 0 elsewhere.

    Online hard example mining (Shrivastava et al. 2016) with the ratio 3 of SSD (Liu et al. 2016),
    over the counted cells of all images and scales of this process's batch. A batch without a
    positive keeps as many negatives as one positive would: images without objects teach too.
    """

    # Of the .1: a kept cell weighs as in BCE, but the mean is over few cells, nearly all of them
    # hard. With 1 the term began at 16 times BCE's beside a location term of weight .05.
    gain, wants_mask, normalizer = 0.1, True, "positives"

    def __init__(self, ratio: float = 3.0):
        super().__init__()
        check_argument("ratio", ratio, 0 < ratio < math.inf, "a number above 0")
        self.ratio = ratio

    def forward(self, logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool, True where a cell is counted, the others get 0; None counts all."""
        logits, targets = upcast(logits, targets)
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
        return bce * self._kept(bce, targets > 0, mask)

    @torch.no_grad()
    def _kept(self, bce: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
        """Bool: counted positives, and ratio * positives counted negatives, also among ties."""
        positive, negative = positive & mask, ~positive & mask
        order = torch.where(negative, bce, -1).flatten().argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(0, order, torch.arange(len(order), device=order.device))
        wanted = self.ratio * positive.sum().clamp(min=1)
        return positive | (negative & (rank.view_as(negative) < wanted))
