"""alpha="auto": the weight of positives from their measured share."""

import torch
from torch import Tensor, nn

from utils.distributed import sum_over_ranks


class MeasuredAlpha(nn.Module):
    """Weights losses by alpha_t, alpha = 1 - share of positives among the counted cells.

    Inverse class frequency (Lin et al. 2017, section 3.1): both classes get the same total weight.
    The share is over all training batches so far, of all ranks; in eval mode nothing is added,
    and before anything is stored the batch at hand serves.
    """

    positives: Tensor
    counted: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("positives", torch.zeros((), dtype=torch.float64))
        self.register_buffer("counted", torch.zeros((), dtype=torch.float64))

    @property
    def alpha(self) -> Tensor:
        """Weight of positives after the training batches so far: a scalar on the device."""
        return 1 - self.positives / self.counted.clamp(min=1)

    def forward(self, losses: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """All of one shape; mask: bool, True where a cell is counted; None counts all."""
        share = self._share(targets > 0, torch.ones_like(targets > 0) if mask is None else mask)
        share = share.to(losses.dtype)
        return torch.where(targets > 0, (1 - share) * losses, share * losses)

    @torch.no_grad()
    def _share(self, positive: Tensor, counted: Tensor) -> Tensor:
        batch = torch.stack(((positive & counted).sum(), counted.sum())).double()
        positives, cells = sum_over_ranks(batch)
        if self.training:
            self.positives += positives
            self.counted += cells
        stored = self.counted > 0
        cells = torch.where(stored, self.counted, cells)
        return torch.where(stored, self.positives, positives) / cells.clamp(min=1)
