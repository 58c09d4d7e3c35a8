"""Sigmoid focal loss (Lin et al. 2017), as a function and as a module, for any detector."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import UserError

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda losses: losses,
    "sum": torch.sum,
    "mean": lambda losses: _mean(losses),
}


def _mean(losses: Tensor) -> Tensor:
    """The mean, and a differentiable 0 for no elements, where torch's mean would be NaN."""
    return losses.sum() / max(1, losses.numel())


def check_focal_arguments(alpha: float, gamma: float) -> None:
    """Raises UserError unless alpha is in 0..1 or -1 (no weighting), and gamma is 0 or more."""
    if isinstance(alpha, str) or not (0 <= alpha <= 1 or alpha == -1):
        raise UserError(
            f"alpha is {alpha!r}. It weights positives by alpha and negatives by 1 - alpha: "
            "give 0 to 1, or -1 for no weighting."
        )
    if not 0 <= gamma < math.inf:
        raise UserError(f"gamma is {gamma}. Give 0 (no focus) or more; 2 is usual.")


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction {reduction!r} is unknown. Allowed: {', '.join(REDUCTIONS)}.")


def upcast(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Half-precision logits as float32, others as they are; the targets in the same dtype."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits, targets.to(logits.dtype)


def power(difficulty: Tensor, gamma: float) -> Tensor:
    """difficulty ** gamma, difficulty 0 or more, with a finite gradient everywhere."""
    if 0 < gamma < 1:  # 0 ** gamma has no finite gradient
        difficulty = difficulty.clamp(min=torch.finfo(difficulty.dtype).eps)
    return difficulty**gamma


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    """alpha_t |y - p|^gamma BCE (Lin et al. 2017); gradients flow through the factor, too.

    For targets of 0 and 1 it equals torchvision.ops.sigmoid_focal_loss.

    Args:
        logits: Any shape. Half precision is computed, and returned, in float32.
        targets: The same shape: 0 for negatives, in (0, 1] for positives.
        alpha: Weight of positives; negatives have 1 - alpha. -1 leaves both out.
        gamma: Focusing parameter; 0 is weighted BCE.
        reduction: "none", "mean" or "sum".

    Returns:
        Losses of the same shape, or a scalar for "mean" and "sum".

    Raises:
        UserError: For an argument that is not allowed.
    """
    check_focal_arguments(alpha, gamma)
    _check_reduction(reduction)
    logits, targets = upcast(logits, targets)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    losses = power((targets - logits.sigmoid()).abs(), gamma) * bce
    if alpha >= 0:
        losses = torch.where(targets > 0, alpha * losses, (1 - alpha) * losses)
    return REDUCTIONS[reduction](losses)


class SigmoidFocalClassificationLoss(nn.Module):
    """Focal loss over independent classes, each a sigmoid: for the head of any detector.

    Args:
        gamma: Focusing parameter.
        alpha: Weight of positives; -1 leaves it out.
        reduction: "none", "mean" (over all elements) or "sum", which the paper divides by the
            number of positives.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25, reduction: str = "mean"):
        super().__init__()
        check_focal_arguments(alpha, gamma)
        _check_reduction(reduction)
        self.gamma, self.alpha, self.reduction = gamma, alpha, reduction

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of logits against classes.

        Args:
            logits: (..., C).
            targets: 0/1 of the same shape, or class indices (...,). An index outside 0..C-1 is
                background: a negative for every class (torchvision's labels, where 0 is
                background, are `labels - 1`).
            weights: (..., C), or (...,) for one a row. They multiply the losses before the
                reduction, so that a row to ignore has weight 0.
        """
        given = targets.shape
        if targets.shape == logits.shape[:-1]:
            classes = torch.arange(logits.shape[-1], device=logits.device)
            targets = targets[..., None] == classes
        if targets.shape != logits.shape:
            raise UserError(
                f"targets of shape {tuple(given)} do not fit logits of shape "
                f"{tuple(logits.shape)}. Give 0/1 of that shape, or class indices without its "
                "last dimension."
            )
        losses = sigmoid_focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma)
        if weights is not None:
            losses = losses * _expand_weights(weights, logits)
        return REDUCTIONS[self.reduction](losses)


def _expand_weights(weights: Tensor, logits: Tensor) -> Tensor:
    """Weights of rows or of elements in the shape of the logits."""
    rows = weights[..., None] if weights.ndim == logits.ndim - 1 else weights
    try:
        return rows.expand_as(logits)
    except RuntimeError:
        raise UserError(
            f"weights of shape {tuple(weights.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}. Give that shape, or one weight a row, without its last "
            "dimension."
        ) from None
