"""Variants of a benchmark, each in a process of its own: nothing but the machine is shared."""

import json
import subprocess
import sys
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def run_variant(module: str, variant: str) -> dict[str, float]:
    """What `python -m MODULE ... --variant VARIANT` prints last, JSON; with this process' flags."""
    command = [sys.executable, "-m", module, *sys.argv[1:], "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turn(module: str, variants: tuple[str, ...], rounds: int) -> dict[str, list[dict]]:
    """Each variant `rounds` times, in turn."""
    found: dict[str, list[dict]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, results in found.items():
            results.append(run_variant(module, variant))
    return found
