"""Cells weighed by how many are as difficult as they."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.conf.registry import check_argument, conf_loss
from losses.focal import upcast
from utils.distributed import sum_over_ranks


@conf_loss("ghm")
class GHM(nn.Module):
    """GHM-C: BCE weighted by the inverse density of g = |p - y| (Li et al. 2019).

    Weight of a cell = 1 / (share of its bin * number of bins that hold a cell), so that every bin
    of difficulty has the same total weight; with momentum 0 the weights' mean over the counted
    cells is 1.
    bins 30. The shares are of the counted cells of all scales and ranks, averaged over the
    training batches with momentum .75 (0: of this batch alone); in eval mode the stored ones
    serve, this batch's where nothing is stored, and nothing changes.
    """

    # Of the .1: the authors weigh their box term 10 beside it. With 1 the term began at 8 times
    # BCE's, and the class term drowned: BCCD's white cells had the right name in 72% of the cases.
    gain, wants_mask = 0.1, True

    shares: Tensor
    weight: Tensor

    def __init__(self, bins: int = 30, momentum: float = 0.75):
        super().__init__()
        allowed = isinstance(bins, int) and 1 <= bins <= 1000
        check_argument("bins", bins, allowed, "a whole number from 1 to 1000")
        check_argument("momentum", momentum, 0 <= momentum < 1, "0 (this batch) or more, below 1")
        self.bins, self.momentum = bins, momentum
        self.register_buffer("shares", torch.zeros(bins, dtype=torch.float64))
        # 1 - momentum^t after t batches: what the average's start at 0 has left for them
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    def forward(self, logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool, True where a cell is counted, the others get 0; None counts all."""
        logits, targets = upcast(logits, targets)
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
        return self._weights(logits, targets, mask).to(bce.dtype) * bce

    @torch.no_grad()
    def _weights(self, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        difficulty = (logits.sigmoid() - targets).abs().nan_to_num(nan=1.0)
        bin_ids = (difficulty * self.bins).long().clamp(0, self.bins - 1)
        counts = torch.zeros_like(self.shares)
        counts.scatter_add_(0, bin_ids.flatten(), mask.flatten().to(counts.dtype))
        counts = sum_over_ranks(counts)
        floor = 1 / counts.sum().clamp(min=1)
        shares = self._average(counts * floor).clamp(min=floor)
        occupied = (counts > 0).sum().clamp(min=1)
        return (1 / (shares * occupied))[bin_ids] * mask

    def _average(self, shares: Tensor) -> Tensor:
        """The bias-corrected moving average, this batch's shares taken in when training."""
        if self.training:
            # A batch without counted cells has no shares and leaves the average as it is.
            step = (1 - self.momentum) * (shares.sum() > 0).to(shares.dtype)
            self.shares.lerp_(shares, step)
            self.weight.lerp_(torch.ones_like(self.weight), step)
        return torch.where(self.weight > 0, self.shares / self.weight, shares)
