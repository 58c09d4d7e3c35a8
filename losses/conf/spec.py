"""Confidence losses as text: "name", "name(key=value, ...)" or "module:Class(key=value, ...)"."""

import ast
import copy
import difflib
import importlib
import inspect
import math
import os
import re
import sys
import traceback
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from losses.conf.registry import CONF_LOSSES, SETTING_KEYS, conf_settings, is_number
from utils.errors import UserError

ALSO = "Every loss also takes " + ", ".join(f"{key}=" for key in SETTING_KEYS) + "."
SPEC = re.compile(r"\s*(?:([\w.]+)\s*:\s*)?(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def conf_loss_spec(conf_loss: str, focal_loss: bool, focal_alpha: float, focal_gamma: float) -> str:
    """The confidence loss in full: `conf_loss`, "bce" if that is empty, or focal with its values.

    Raises UserError if `conf_loss` and `focal_loss` are both given.
    """
    if not focal_loss:
        return conf_loss or "bce"
    focal = f"focal(alpha={focal_alpha!r}, gamma={focal_gamma!r})"
    if conf_loss:
        raise UserError(
            f"focal_loss and conf_loss {conf_loss!r} are both given. Drop focal_loss, or write "
            f'conf_loss="{focal}" alone.'
        )
    return focal


def build_conf_loss(spec: str) -> nn.Module:
    """Build "name", "name(key=value, ...)" or "module:Class(key=value, ...)".

    Args:
        spec: Values are Python literals and are never evaluated. The keys are the constructor's,
            and SETTING_KEYS for what the class declares. `module:Class` is a user's own nn.Module,
            searched in the working directory first: importing it runs its file, so pass on only
            what was typed for this run.

    Raises:
        UserError: For anything else; it says what is allowed.
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
    usage = spec_usage(name, cls)
    values = _parse_arguments(spec, arguments or "", usage)
    settings = {k: values.pop(k) for k in SETTING_KEYS if k in values and k not in parameters}
    for key, value in values.items():
        _check_value(key, value, parameters, usage)
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in values]
    if missing:
        raise UserError(f"confidence loss {spec!r} needs {', '.join(missing)}. Write {usage}.")
    loss = _construct(cls, values, usage)
    for key, value in settings.items():
        setattr(loss, key, value)
    _check_contract(loss, name)
    return loss


def _construct(cls: type[nn.Module], values: dict[str, Any], usage: str) -> nn.Module:
    try:
        return cls(**values)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"confidence loss {usage} cannot be made: {_said(error)}") from error


def _check_contract(loss: nn.Module, name: str) -> None:
    """Call a copy once: a loss that reduces would train without a word, and badly."""
    settings = conf_settings(loss)
    targets = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    given, logits = targets.clone(), torch.linspace(-2, 2, 6).view(2, 3).requires_grad_()
    mask = (torch.ones_like(targets, dtype=torch.bool),) if settings.wants_mask else ()
    takes = "logits, targets, mask" if mask else "logits, targets"
    try:
        with torch.random.fork_rng(devices=[]):
            losses = copy.deepcopy(loss)(logits, given, *mask)
    except Exception as error:
        raise UserError(f"confidence loss {name}: forward({takes}) {_said(error)}") from error
    if not isinstance(losses, Tensor) or losses.shape != logits.shape:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise UserError(
            f"confidence loss {name} returns {found} for logits of shape {tuple(logits.shape)}. "
            'Return one loss a cell: reduction="none", no mean() or sum().'
        )
    if not torch.equal(given, targets):
        raise UserError(f"confidence loss {name} changes its targets; work on a copy of them.")


def _said(error: Exception) -> str:
    """An error of a user's own code, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {error}{where}."


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
            f'strings in quotes (alpha="auto"), True, False or None. {ALSO}'
        ) from None


def _check_value(
    key: str, value: Any, parameters: dict[str, inspect.Parameter], usage: str
) -> None:
    """Check that the key exists and its value has the parameter's type."""
    if key not in parameters:
        close = difflib.get_close_matches(key, [*parameters, *SETTING_KEYS], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"confidence loss: {key!r} is no key of {usage}.{hint} {ALSO}")
    wanted = _wanted(value, parameters[key])
    if wanted:
        raise UserError(f"confidence loss: {key}={value!r} in {usage} must be {wanted}.")


def _wanted(value: Any, parameter: inspect.Parameter) -> str:
    """The expected type of a value; "" if it fits or the parameter has no default or annotation.

    The type follows from the default; a Literal annotation lists the allowed strings.
    """
    default = parameter.default
    annotations = (parameter.annotation, *get_args(parameter.annotation))
    words = [w for a in annotations if get_origin(a) is Literal for w in get_args(a)]
    if isinstance(default, bool):
        fits, kinds = isinstance(value, bool), ["True or False"]
    elif parameter.annotation is int:
        fits, kinds = is_number(value) and isinstance(value, int), ["a whole number"]
    elif is_number(default):
        fits, kinds = is_number(value) and math.isfinite(value), ["a finite number"]
    elif isinstance(default, str):
        fits, kinds = isinstance(value, str) and not words, [] if words else ["a string"]
    else:
        return ""
    return "" if fits or value in words else " or ".join(kinds + [f'"{word}"' for word in words])


def _import_class(module: str, name: str) -> type[nn.Module]:
    """A user's own class; the working directory is searched first, during this import only."""
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        importlib.invalidate_caches()
        cls = getattr(importlib.import_module(module), name, None)
        registered = CONF_LOSSES.get(name)  # by @conf_loss in that file
        if cls is None and registered is not None and registered.__module__ == module:
            cls = registered
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"conf_loss {module}:{name}: cannot import {module!r} ({error}). It is searched in "
            f"{directory} and Python's path, and is written without .py."
        ) from error
    except Exception as error:
        raise UserError(f"conf_loss {module}:{name}: {module} {_said(error)}") from error
    finally:
        sys.path.remove(directory)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        file = vars(sys.modules[module])
        own = [key for key, value in file.items() if getattr(value, "__module__", "") == module]
        raise UserError(
            f"conf_loss {module}:{name}: {module} has no nn.Module named {name!r}. It has "
            f"{', '.join(own) or 'nothing of its own'}."
        )
    return cls


def _parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The named constructor arguments; a class without any shows nn.Module's *args, **kwargs."""
    found = inspect.signature(cls).parameters
    return {k: p for k, p in found.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def spec_usage(name: str, cls: type[nn.Module]) -> str:
    """A class as it is written: focal(alpha=0.25, gamma=2.0)."""
    keys = (
        key if p.default is p.empty else f"{key}={p.default!r}"
        for key, p in _parameters(cls).items()
    )
    return f"{name}({', '.join(keys)})"


def _allowed() -> str:
    usages = ", ".join(spec_usage(name, cls) for name, cls in sorted(CONF_LOSSES.items()))
    return f"Allowed: {usages}, or module:Class for your own nn.Module. {ALSO}"
