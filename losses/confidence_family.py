"""The confidence losses beside bce and focal. z logit, p = sigmoid z, y target, q IoU target.

Each is elementwise except ghm and ohem (confidence_mining.py), which look across the cells.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import losses.confidence_mining  # noqa: F401 - registers ghm and ohem
from losses.confidence import Focal, check_argument, conf_loss
from losses.focal import check_focal_arguments, power, sigmoid_focal_loss, upcast

# Of the losses that are divided by the positives, but for focal_pi, which is as published. There
# the sum stands beside a box term of weight 1 or 2; in YOLOLoss the boxes weigh .05 and the
# classes C / 80. With a gain of 1 the class term drowned: quality_focal found BCCD's rarest class
# nearly as well as BCE did, but gave it the right name in 30% of the cases instead of 69%.
BESIDE_BOXES = 0.1


@conf_loss("balanced_bce")
class BalancedBCE(Focal):
    """alpha_t BCE: focal with gamma 0 (the baseline of Lin et al. 2017, table 1a).

    alpha .75 for positives and .25 for negatives, the best there; -1 and "auto" as in focal.
    """

    gain = 1.0

    def __init__(self, alpha: float | Literal["auto"] = 0.75):
        super().__init__(alpha=alpha, gamma=0.0)


@conf_loss("focal_pi")
class FocalPi(Focal):
    """Focal as published: gain 1, over the positives, prior .01 (Lin et al. 2017).

    alpha_t |y - p|^gamma BCE with alpha .25, gamma 2. The prior keeps the negatives' sum small at
    the start, and the number of positives is a divisor that the easy negatives do not inflate.
    """

    gain, normalizer, prior_pi = 1.0, "positives", 0.01


@conf_loss("quality_focal")
class QualityFocal(nn.Module):
    """|q - p|^beta BCE(z, q): objectness learns the IoU of its box (GFL, Li et al. 2020).

    beta 2; a cell fades as it nears its target, so positives of poor boxes rest at a low score.
    """

    gain, normalizer, prior_pi, wants_iou = BESIDE_BOXES, "positives", 0.01, True

    def __init__(self, beta: float = 2.0):
        super().__init__()
        check_argument("beta", beta, 0 <= beta < math.inf, "0 (BCE) or more")
        self.beta = beta

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, targets, alpha=-1, gamma=self.beta)


@conf_loss("varifocal")
class Varifocal(nn.Module):
    """Positive q BCE(z, q); negative alpha p^gamma BCE(z, 0) (Zhang et al. 2021).

    alpha .75, gamma 2. Only negatives fade when easy: positives are few, and the better their box
    the more they weigh.
    """

    gain, normalizer, prior_pi, wants_iou = BESIDE_BOXES, "positives", 0.01, True

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0):
        super().__init__()
        check_argument("alpha", alpha, 0 <= alpha < math.inf, "0 or more")
        check_argument("gamma", gamma, 0 <= gamma < math.inf, "0 (no focus) or more")
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = upcast(logits, targets)
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        negative = self.alpha * power(logits.sigmoid(), self.gamma)
        return torch.where(targets > 0, targets, negative) * bce


def _miss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - p_t: the probability given to the wrong side; any target above 0 is a positive."""
    return torch.where(targets > 0, -logits, logits).sigmoid()


@conf_loss("poly1")
class Poly1(nn.Module):
    """BCE + epsilon (1 - p_t): a stronger pull on uncertain cells; epsilon 1 (Leng et al. 2022)."""

    def __init__(self, epsilon: float = 1.0):
        super().__init__()
        check_argument("epsilon", epsilon, math.isfinite(epsilon), "a finite number")
        self.epsilon = epsilon

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = upcast(logits, targets)
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return bce + self.epsilon * _miss(logits, targets)


@conf_loss("poly1_focal")
class Poly1Focal(nn.Module):
    """Focal + epsilon (1 - p_t)^(gamma + 1), the last without alpha_t (Leng et al. 2022).

    alpha .25, gamma 2, epsilon 1; alpha -1 weights neither class.
    """

    gain, normalizer, prior_pi = BESIDE_BOXES, "positives", 0.01

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, epsilon: float = 1.0):
        super().__init__()
        check_focal_arguments(alpha, gamma)
        check_argument("epsilon", epsilon, math.isfinite(epsilon), "a finite number")
        self.alpha, self.gamma, self.epsilon = alpha, gamma, epsilon

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = upcast(logits, targets)
        focal = sigmoid_focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma)
        return focal + self.epsilon * _miss(logits, targets) ** (self.gamma + 1)


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
