"""The non-finite guard: the device skips a bad step, and the host learns it a step later."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from utils.errors import UserError


class Rollback:
    """Undo one forward's effect on BN statistics and on the loss's state, without a sync.

    A forward with a non-finite activation would poison the running mean and variance for good,
    though its step is skipped. All statistics become views of one flat tensor, so that a
    snapshot and a selective restore are two kernels, not two for each of 107 layers. The state of
    a loss, such as GHM's histogram, is a few small buffers.
    """

    def __init__(self, model: nn.Module, loss: nn.Module):
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        places = [(m, name) for m in norms for name in ("running_mean", "running_var")]
        self.loss = loss
        self.flat = torch.cat([getattr(module, name) for module, name in places])
        start = 0
        for module, name in places:
            size = getattr(module, name).numel()
            setattr(module, name, self.flat[start : start + size])
            start += size
        self.saved, self.saved_loss = self.flat.clone(), dict[str, Tensor]()

    def snapshot(self) -> None:
        """Remember both before a forward."""
        self.saved.copy_(self.flat)
        self.saved_loss = {name: value.clone() for name, value in self.loss.state_dict().items()}

    def restore_unless(self, finite: Tensor) -> None:
        """Go back to the snapshot where `finite` (a bool scalar on the device) is false."""
        self.flat.copy_(torch.where(finite, self.flat, self.saved))
        for name, value in self.loss.state_dict().items():
            value.copy_(torch.where(finite, value, self.saved_loss[name]))


class NonFiniteGuard:
    """Counts skipped updates on the host and stops a training that only skips.

    limit: skipped updates in a row. Half precision overflows while its gradient scaler finds its
    scale, a dozen times or so at the start, so its limit is higher. conf_loss: the name of the
    confidence loss, named when its term alone is not finite.
    """

    def __init__(self, *, limit: int = 5, conf_loss: str = ""):
        self.limit, self.conf_loss = limit, conf_loss
        self.in_a_row = 0
        self.made = 0
        self.skipped = 0
        self._last = "Start a new run."  # then what there is to say of the last bad batch

    def updated(self) -> None:
        """Note an update that was made."""
        self.in_a_row = 0
        self.made += 1

    def check(self, terms: Mapping[str, float], *, skipped: bool, images: Sequence[str]) -> str:
        """Count a batch with a non-finite loss or gradient. Returns a message.

        skipped: it ended an update, which was not made. Raises UserError after `limit` of them
        in a row.
        """
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        message = f"non-finite loss or gradient, update skipped ({values}); images of this "
        message += f"process: {', '.join(images)}"
        self.skipped += skipped
        self.in_a_row += skipped
        self._last = f"Last: {message}. {self._cure(terms)}"
        if self.in_a_row >= self.limit:
            raise UserError(f"{self.limit} updates in a row were skipped. {self._last}")
        return message

    def check_learnt(self) -> None:
        """Raises UserError where a training ends whose updates were all skipped."""
        if self.skipped and not self.made:
            raise UserError(
                f"nothing was learnt: all {self.skipped} updates were skipped. {self._last}"
            )

    def _cure(self, terms: Mapping[str, float]) -> str:
        """What to do, and in the last words which term is not finite."""
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        bad = [name for name in bad if name not in ("total", "grad_norm")]
        if bad == ["conf"]:
            return f"Look into the confidence loss, {self.conf_loss}. Not finite: conf alone."
        cure = (
            "Lower --lr or --clip_norm, check these images, or try --amp off: with --resume "
            "where a last.pt was written, or from the start."
        )
        return f"{cure} Not finite: {', '.join(bad) or 'the gradient, though the loss is'}."
