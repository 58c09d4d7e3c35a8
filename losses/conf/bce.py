"""Binary cross-entropy."""

from torch import Tensor, nn
from torch.nn import functional as F

from losses.conf.registry import conf_loss
from losses.focal import upcast


@conf_loss("bce")
class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy on logits: every cell counts the same."""

    # On logits, not on clamped probabilities: with a clamp at 1e-7 the gradient is exactly zero
    # below logit -16.1, so a confidently missed object could never be learnt again.
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(*upcast(logits, targets), reduction="none")
