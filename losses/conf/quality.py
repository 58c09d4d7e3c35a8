"""Losses towards the IoU of the box. z logit, p = sigmoid z, y target, q IoU target."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.conf.registry import BESIDE_BOXES, check_argument, conf_loss
from losses.focal import power, sigmoid_focal_loss, upcast


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
