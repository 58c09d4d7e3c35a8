"""Focal loss in three forms: the original fork's, as published, and without its focus."""

from typing import Literal

from torch import Tensor, nn

from losses.conf.alpha import MeasuredAlpha
from losses.conf.registry import conf_loss
from losses.focal import check_focal_arguments, sigmoid_focal_loss


@conf_loss("focal")
class Focal(nn.Module):
    """alpha_t |y - p|^gamma BCE: easy cells fade, hard ones stay (Lin et al. 2017).

    alpha weights positives, 1 - alpha negatives; -1: no weighting; "auto": `MeasuredAlpha`.
    """

    gain = 10.0  # the original fork's: at p = .5 the term is then of BCE's size

    def __init__(self, alpha: float | Literal["auto"] = 0.25, gamma: float = 2.0):
        super().__init__()
        self.fixed_alpha = -1.0 if alpha == "auto" else alpha
        check_focal_arguments(self.fixed_alpha, gamma)
        self.alpha, self.gamma = alpha, gamma
        self.measured = None
        if alpha == "auto":  # only then: a subclass may declare wants_mask for itself
            self.measured, self.wants_mask = MeasuredAlpha(), True

    def forward(self, logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        losses = sigmoid_focal_loss(logits, targets, alpha=self.fixed_alpha, gamma=self.gamma)
        return losses if self.measured is None else self.measured(losses, targets, mask)


@conf_loss("focal_pi")
class FocalPi(Focal):
    """Focal as published: gain 1, over the positives, prior .01 (Lin et al. 2017).

    alpha_t |y - p|^gamma BCE with alpha .25, gamma 2. The prior keeps the negatives' sum small at
    the start, and the number of positives is a divisor that the easy negatives do not inflate.
    """

    gain, normalizer, prior_pi = 1.0, "positives", 0.01


@conf_loss("balanced_bce")
class BalancedBCE(Focal):
    """alpha_t BCE: focal with gamma 0 (the baseline of Lin et al. 2017, table 1a).

    alpha .75 for positives and .25 for negatives, the best there; -1 and "auto" as in focal.
    """

    gain = 1.0

    def __init__(self, alpha: float | Literal["auto"] = 0.75):
        super().__init__(alpha=alpha, gamma=0.0)
