"""Variants of a benchmark, each in a process of its own: nothing but the machine is shared."""

import dataclasses
import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run_json(command: Sequence[object], **options: Any) -> dict[str, float]:
    """What a command prints last, JSON. options: of subprocess.run."""
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise UserError(f"{shlex.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_variant(module: str, config: Any) -> dict[str, float]:
    """What `python -m MODULE` prints last, JSON, with a config whose `variant` is set."""
    return run_json([sys.executable, "-m", module, *flags_of(config)], cwd=ROOT)


def flags_of(config: Any) -> list[str]:
    """The flags that make a config out of its defaults."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no_'}{field.name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{field.name}", *map(str, values)]
    return flags


def run_in_turn(module: str, config: Any, variants: tuple[str, ...]) -> dict[str, list[dict]]:
    """Each variant of a benchmark `config.rounds` times, in turn."""
    calls = {
        variant: functools.partial(
            run_variant, module, dataclasses.replace(config, variant=variant)
        )
        for variant in variants
    }
    return call_in_turn(calls, config.rounds)


def call_in_turn(calls: Mapping[str, Callable[[], dict]], rounds: int) -> dict[str, list[dict]]:
    """What each call gives, `rounds` times, in turn."""
    found: dict[str, list[dict]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return found


def status_bytes(name: str) -> int:
    """A memory figure of this process, such as VmRSS or VmHWM, in bytes. Linux."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
