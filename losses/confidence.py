"""The plug: confidence losses by name, and how to add one.

A confidence loss is an nn.Module whose `forward(logits, targets)` returns one loss an element,
unreduced, for any shape. Targets are 0 for negatives and in (0, 1] for positives. Decorate it
with `@conf_loss("name")` and it is a name for --conf_loss; or keep it in a file of your own and
name it `module:Class`. How YOLOLoss uses it is declared by the class attributes of ConfSettings.
"""

import ast
import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from losses.focal import check_focal_arguments, sigmoid_focal_loss
from utils.errors import UserError

CONF_LOSSES: dict[str, type[nn.Module]] = {}  # name -> class, filled by @conf_loss
NORMALIZERS = ("mean", "positives")
SPEC = re.compile(r"\s*(?:([\w.]+)\s*:\s*)?(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


class ConfSettings(NamedTuple):
    """What a class may declare beside its maths; YOLOLoss applies it, `forward` never does."""

    gain: float = 1.0  # weight of the term
    normalizer: str = "mean"  # over the counted cells of a scale; or "positives" of the batch
    prior_pi: float | None = None  # objectness that heads should start from
    wants_iou: bool = False  # a positive's target is the IoU of its box, not 1
    wants_mask: bool = False  # forward(logits, targets, mask), mask True where a cell is counted


def conf_loss(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register the decorated class under a name. Raises UserError if another class has it."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        known = CONF_LOSSES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise UserError(
                f"confidence loss {name!r} is taken by {known.__module__}.{known.__qualname__}. "
                f"Give {cls.__qualname__} another name."
            )
        CONF_LOSSES[name] = cls
        return cls

    return register


@conf_loss("bce")
class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy on logits: every cell counts the same."""

    # On logits, not on clamped probabilities: with a clamp at 1e-7 the gradient is exactly zero
    # below logit -16.1, so a confidently missed object could never be learnt again.
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


@conf_loss("focal")
class Focal(nn.Module):
    """alpha_t |y - p|^gamma BCE: easy cells fade, hard ones stay (Lin et al. 2017)."""

    gain = 10.0  # keeps the term near BCE's size, as the original fork does

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        check_focal_arguments(alpha, gamma)
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma)


def conf_settings(loss: nn.Module) -> ConfSettings:
    """What a loss declares, defaults filled in. Raises UserError for an impossible value."""
    defaults = ConfSettings._field_defaults
    settings = ConfSettings(*(getattr(loss, name, value) for name, value in defaults.items()))
    name = type(loss).__name__
    if settings.normalizer not in NORMALIZERS:
        allowed = ", ".join(NORMALIZERS)
        raise UserError(f"{name}.normalizer is {settings.normalizer!r}. Allowed: {allowed}.")
    if not 0 < settings.gain < math.inf:
        raise UserError(f"{name}.gain is {settings.gain}. Give a number above 0.")
    if settings.prior_pi is not None and not 0 < settings.prior_pi < 1:
        raise UserError(f"{name}.prior_pi is {settings.prior_pi}. Give None or 0 < pi < 1.")
    return settings


def build_conf_loss(spec: str) -> nn.Module:
    """Build "name", "name(key=value, ...)" or "module:Class(key=value, ...)".

    Values are Python literals and are never evaluated. `module:Class` is a user's own nn.Module,
    searched in the working directory first: importing it runs its file, so pass on only what was
    typed for this run. Raises UserError, saying what is allowed, for anything else.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise UserError(f"confidence loss {spec!r} cannot be read. {_allowed()}")
    module, name, arguments = match.groups()
    cls = _import_class(module, name) if module else CONF_LOSSES.get(name)
    if cls is None:
        close = difflib.get_close_matches(name, CONF_LOSSES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"confidence loss {name!r} is unknown.{hint} {_allowed()}")
    parameters = _parameters(cls)
    usage = _usage(name, cls)
    values = _parse_arguments(spec, arguments or "", usage)
    for key, value in values.items():
        _check_value(key, value, parameters, usage)
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in values]
    if missing:
        raise UserError(f"confidence loss {spec!r} needs {', '.join(missing)}. Write {usage}.")
    return cls(**values)


def _parse_arguments(spec: str, arguments: str, usage: str) -> dict[str, Any]:
    """The key=value pairs of a spec as literals."""
    try:
        call = ast.parse(f"f({arguments}\n)", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("only key=value pairs are allowed")
        values = {pair.arg or "**": ast.literal_eval(pair.value) for pair in call.keywords}
        if len(values) < len(call.keywords):
            raise ValueError("a key is given twice")
        return values
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(
            f"confidence loss {spec!r} cannot be read. Write {usage}, values as plain numbers, "
            "strings, True, False or None."
        ) from None


def _check_value(
    key: str, value: Any, parameters: dict[str, inspect.Parameter], usage: str
) -> None:
    """The key exists, and its value is of the default's kind: a number for a number."""
    if key not in parameters:
        close = difflib.get_close_matches(key, parameters, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"confidence loss: {key!r} is no key of {usage}.{hint}")
    default = parameters[key].default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool | str):
        fits = isinstance(value, type(default))
    elif isinstance(default, int | float):
        fits = is_number and math.isfinite(value)
    else:
        fits = True
    if not fits:
        kind = "finite number" if isinstance(default, float) else type(default).__name__
        raise UserError(f"confidence loss: {key}={value!r} in {usage} must be a {kind}.")


def _import_class(module: str, name: str) -> type[nn.Module]:
    """A user's own class; the working directory is searched first, during this import only."""
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        importlib.invalidate_caches()
        cls = getattr(importlib.import_module(module), name, None)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"conf_loss {module}:{name}: cannot import {module!r} ({error}). It is searched in "
            f"{directory} and Python's path."
        ) from error
    finally:
        sys.path.remove(directory)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"conf_loss {module}:{name}: {module} has no nn.Module named {name!r}.")
    return cls


def _parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The named constructor arguments; a class without any shows nn.Module's *args, **kwargs."""
    found = inspect.signature(cls).parameters
    return {k: p for k, p in found.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _usage(name: str, cls: type[nn.Module]) -> str:
    """A class as it is written: focal(alpha=0.25, gamma=2.0)."""
    keys = (
        key if p.default is p.empty else f"{key}={p.default!r}"
        for key, p in _parameters(cls).items()
    )
    return f"{name}({', '.join(keys)})"


def _allowed() -> str:
    usages = ", ".join(_usage(name, cls) for name, cls in sorted(CONF_LOSSES.items()))
    return f"Allowed: {usages}, or module:Class for your own nn.Module."
