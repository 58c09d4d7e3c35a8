"""Other focus for positives and negatives, and very easy negatives dropped."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.conf.registry import BESIDE_BOXES, check_argument, conf_loss
from losses.focal import power, upcast


@conf_loss("asymmetric")
class Asymmetric(nn.Module):
    """Positive -(1 - p)^g+ ln p; negative -m^g- ln(1 - m), m = max(p - margin, 0).

    g+ (gamma_positive) 1, g- (gamma_negative) 4, margin .05 (ASL, Ridnik et al. 2021): negatives
    below the margin are dropped, the others fade faster than positives. Any target above 0 is a
    whole positive.
    """

    gain, normalizer = BESIDE_BOXES, "positives"

    def __init__(
        self, gamma_positive: float = 1.0, gamma_negative: float = 4.0, margin: float = 0.05
    ):
        super().__init__()
        for name, gamma in (("gamma_positive", gamma_positive), ("gamma_negative", gamma_negative)):
            check_argument(name, gamma, 0 <= gamma < math.inf, "0 (no focus) or more")
        check_argument("margin", margin, 0 <= margin < 1, "0 (none) or more, below 1")
        self.gamma_positive, self.gamma_negative = gamma_positive, gamma_negative
        self.margin = margin

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = upcast(logits, targets)
        positive = power((-logits).sigmoid(), self.gamma_positive) * F.logsigmoid(logits)
        # ln(1 - m) = min(ln(1 - p + margin), 0): finite where p rounds to 1, even with margin 0
        margin = torch.full_like(logits, math.log(self.margin) if self.margin else -math.inf)
        log_rest = torch.logaddexp(F.logsigmoid(-logits), margin).clamp(max=0)
        shifted = (logits.sigmoid() - self.margin).clamp(min=0)
        negative = power(shifted, self.gamma_negative) * log_rest
        return -torch.where(targets > 0, positive, negative)
