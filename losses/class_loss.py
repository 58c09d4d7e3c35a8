"""The class term's loss: one of the confidence losses that look at each class by itself."""

from torch import nn

from losses.conf import CONF_LOSSES, build_conf_loss, conf_settings
from losses.conf.bce import BinaryCrossEntropy
from losses.conf.registry import SETTING_KEYS
from losses.conf.spec import ALSO, SPEC, spec_usage
from utils.errors import UserError


def build_cls_loss(spec: str, label_smoothing: float) -> nn.Module:
    """Build "name" or "name(key=value, ...)" for the class term.

    Raises UserError, saying what is allowed, for a loss that needs other cells or boxes, for code
    of the user's own, for what belongs to conf_loss, and for label smoothing with a loss to which
    it would make every class a positive.
    """
    match = SPEC.fullmatch(spec)
    if match is None or match[1]:
        why = "code of your own is for conf_loss" if match else "it cannot be read"
        raise UserError(f"cls_loss {spec!r}: {why}. {_allowed()}")
    if match[2] not in CONF_LOSSES:
        raise UserError(f"cls_loss {spec!r} is unknown. {_allowed()}")
    try:
        loss = build_conf_loss(spec)
    except UserError as error:
        raise UserError(f"cls_loss: {error}".removesuffix(f" {ALSO}")) from None
    if conf_settings(loss).wants_mask or conf_settings(loss).wants_iou:
        raise UserError(f"cls_loss {spec!r} needs all cells, or boxes: for conf_loss. {_allowed()}")
    if vars(loss).keys() & set(SETTING_KEYS):
        raise UserError(
            f"cls_loss {spec!r}: {', '.join(SETTING_KEYS)} belong to conf_loss and would do "
            "nothing here. Leave them out."
        )
    if label_smoothing and not isinstance(loss, BinaryCrossEntropy):
        raise UserError(
            f"label_smoothing {label_smoothing} makes every class of a cell a positive for "
            f"cls_loss {spec!r}. Use cls_loss bce, or label_smoothing 0."
        )
    return loss


def _allowed() -> str:
    """The registered losses that can be the class term."""
    names = (name for name, cls in sorted(CONF_LOSSES.items()) if _is_elementwise(cls))
    return f"Allowed: {', '.join(spec_usage(name, CONF_LOSSES[name]) for name in names)}."


def _is_elementwise(cls: type[nn.Module]) -> bool:
    return not (getattr(cls, "wants_mask", False) or getattr(cls, "wants_iou", False))
