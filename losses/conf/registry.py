"""The plug: confidence losses by name, and how to add one.

A confidence loss is an nn.Module whose `forward(logits, targets)` returns one loss an element,
unreduced, for any shape. Targets are 0 for negatives and in (0, 1] for positives. Decorate it
with `@conf_loss("name")` and it is a name for --conf_loss; or keep it in a file of your own and
name it `module:Class` (or `module:name`). How YOLOLoss uses it is declared by the class attributes
of ConfSettings; the first three are also keys of every spec: "focal(gamma=1, gain=1)".
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from utils.errors import UserError

CONF_LOSSES: dict[str, type[nn.Module]] = {}  # name -> class, filled by @conf_loss
NORMALIZERS = ("mean", "positives")
SETTING_KEYS = ("gain", "normalizer", "prior_pi")  # declared by a class, changed by a spec
# Tuned under the fork's gains (location .05, classes 1) and not repeated under the defaults. Of the
# losses that are divided by the positives, but for focal_pi, which is as published. There
# the sum stands beside a box term of weight 1 or 2; in YOLOLoss the boxes weigh .05 and the
# classes C / 80. With a gain of 1 the class term drowned: quality_focal found BCCD's rarest class
# nearly as well as BCE did, but gave it the right name in 30% of the cases instead of 69%.
BESIDE_BOXES = 0.1


class ConfSettings(NamedTuple):
    """What a class may declare beside its maths; YOLOLoss applies it, `forward` never does."""

    gain: float = 1.0  # weight of the term
    normalizer: str = "mean"  # over the counted cells of a scale; or "positives" of the batch
    prior_pi: float | None = None  # objectness that heads should start from
    wants_iou: bool = False  # a positive's target is the IoU of its box, not 1
    wants_mask: bool = False  # forward(logits, targets, mask), mask True where a cell is counted

    def __str__(self) -> str:
        prior = "the network's prior" if self.prior_pi is None else f"prior {self.prior_pi}"
        return f"gain {self.gain:g}, normalizer {self.normalizer}, {prior}"


def conf_loss(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register the decorated class under a name. Raises UserError if another class has it."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        known = CONF_LOSSES.get(name)
        if known is not None and _home(known) != _home(cls):
            raise UserError(
                f"confidence loss {name!r} is taken by {known.__module__}.{known.__qualname__}. "
                f"Give {cls.__qualname__} another name."
            )
        CONF_LOSSES[name] = cls
        return cls

    return register


def _home(cls: type) -> tuple[str, str]:
    """The file and the name of a class: the same for one that is run and also imported."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) or cls.__module__, cls.__qualname__


def check_argument(name: str, value: Any, is_allowed: bool, allowed: str) -> None:
    """Raises UserError, saying what is allowed, unless `is_allowed`."""
    if not is_allowed:
        raise UserError(f"{name} is {value!r}. Give {allowed}.")


def conf_settings(loss: nn.Module) -> ConfSettings:
    """What a loss declares, defaults filled in. Raises UserError for an impossible value."""
    defaults = ConfSettings._field_defaults
    declared: dict[str, Any] = {name: getattr(loss, name, defaults[name]) for name in defaults}
    settings = ConfSettings(**declared)
    gain, normalizer, prior_pi, *_ = settings
    name = type(loss).__name__
    if normalizer not in NORMALIZERS:
        raise UserError(f"{name}.normalizer is {normalizer!r}. Allowed: {', '.join(NORMALIZERS)}.")
    if not (is_number(gain) and 0 < gain < math.inf):
        raise UserError(f"{name}.gain is {gain!r}. Give a number above 0.")
    if prior_pi is not None and not (is_number(prior_pi) and 0 < prior_pi < 1):
        raise UserError(f"{name}.prior_pi is {prior_pi!r}. Give None or 0 < pi < 1.")
    return settings


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
