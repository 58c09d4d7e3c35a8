"""BCE or focal loss with the first term of its polynomial changed."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.conf.registry import BESIDE_BOXES, check_argument, conf_loss
from losses.focal import check_focal_arguments, sigmoid_focal_loss, upcast


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


def _miss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - p_t: the probability given to the wrong side; any target above 0 is a positive."""
    return torch.where(targets > 0, -logits, logits).sigmoid()
