"""Whether the runs of a loss were trained with one formula and one set of settings."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.plan import Run
from losses.conf.spec import SPEC
from utils.errors import UserError


def source_hash(loss: str) -> str:
    """SHA-256 of the present file of a `module:Class` loss; "" for a registered loss.

    The loss must have been built in this process. What the file imports does not count.
    """
    match = SPEC.fullmatch(loss)
    module = sys.modules.get(match[1] or "") if match else None
    file = getattr(module, "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except OSError as error:
        raise UserError(f"{loss}: {file} cannot be read ({error}). Bring it back.") from None


def record_source(run: Run, current: str) -> None:
    """Store a `source_hash` beside a run that is about to train."""
    if current:
        run.source_hash.parent.mkdir(parents=True, exist_ok=True)
        run.source_hash.write_text(current, encoding="ascii")


def check_source(run: Run, current: str) -> None:
    """Raise UserError if the run was trained with another version of the user's file.

    Args:
        current: `source_hash` of its loss.
    """
    if not (run.folder / "last.pt").exists() and run.evaluation() is None:
        return  # it begins anew
    recorded = run.source_hash.read_text(encoding="ascii") if run.source_hash.exists() else ""
    if recorded != current:
        raise UserError(
            f"the file of {run.loss} has changed since {run.folder} was trained, so old and new "
            "runs would be of different losses. Bring the old file back, put the new formula into "
            f"a file of its own, or delete {run.folder.parent} to train the loss anew."
        )


def settings_difference(settings: Mapping[str, Mapping[str, Any] | None]) -> str:
    """What was not declared alike, as "gain 0.1 (seed 0), 1.0 (seed 1)"; "" if all agree.

    Args:
        settings: Who -> the ConfSettings of a loss by name; None where none were recorded.
    """
    if not any(settings.values()):
        return ""
    names = dict.fromkeys(name for own in settings.values() for name in own or ())
    texts = []
    for name in names:
        values = {who: own.get(name) for who, own in settings.items() if own}
        if any(value != values[next(iter(values))] for value in values.values()):
            found = ", ".join(f"{value} ({who})" for who, value in values.items())
            texts.append(f"{name} {found}")
    silent = [who for who, own in settings.items() if not own]
    if silent:
        texts.append(f"not recorded ({', '.join(silent)})")
    return "; ".join(texts)
