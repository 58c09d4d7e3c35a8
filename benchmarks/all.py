"""The whole table of speed: every row's script, its aim, what it gave and the machine's limit.

    python -m benchmarks.all --device cpu|cuda [--append]     # --append: to benchmarks/RESULTS.md

A limit is the least time that the counted bytes or operations of a row take at rates measured in
the same run: matrix products (bfloat16 on a GPU), a copy of 128 MiB, the decoding of JPEGs.
"""

import dataclasses
import datetime
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from benchmarks.rows import CPU_ROWS, CUDA_ROWS, Machine, Row, number
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/RESULTS.md"
CPU_WORDS = {"cuda": "cpu", "bf16": "off", "fp16": "off"}  # of a small run without a GPU


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    small: bool = False  # tiny sizes, to see that every script runs; the figures mean nothing
    append: bool = False  # add the table to benchmarks/RESULTS.md
    data: str = ""  # of the cuda rows that train: a split, ROOT:SPLIT, in place of drawn images
    classes_path: str = ""  # its class names


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if config.device not in ("cpu", "cuda"):
        raise UserError(f"--device {config.device}: use cpu or cuda.")
    if config.device == "cuda" and not torch.cuda.is_available() and not config.small:
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu, or --small.")
    start = time.monotonic()
    gpu = config.device == "cuda" and torch.cuda.is_available()
    machine = measure_machine(torch.device("cuda" if gpu else "cpu"))
    lines = []
    rows = CPU_ROWS if config.device == "cpu" else CUDA_ROWS
    for row in tqdm(rows, unit="row", disable=None):
        lines += table_lines(row, run(row, config), machine, with_limit=not config.small)
    text = table(config, machine, lines, minutes=(time.monotonic() - start) / 60)
    print(text)
    if config.append:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(text)


def measure_machine(device: torch.device) -> Machine:
    """The best of ten of each: a limit is what the machine can do, not what it did on average."""
    gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(matrix)
    block = torch.zeros(2**25, device=device)
    copy = torch.zeros_like(block)
    flops = 2 * side**3 / best(lambda: torch.mm(matrix, matrix, out=product), device)
    copied = 2 * block.nbytes / best(lambda: copy.copy_(block), device)
    return Machine(flops, copied, str(dtype).removeprefix("torch."))


def best(call: Callable[[], object], device: torch.device) -> float:
    """Fewest seconds of ten calls, after one more."""
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def run(row: Row, config: Config) -> str:
    """The output of a row's script."""
    flags = shlex.split(row.command)
    if config.small:
        flags += shlex.split(row.small)
    if config.small and not torch.cuda.is_available():
        flags = [CPU_WORDS.get(flag, flag) for flag in flags]
    if config.data and flags[0] == "benchmarks.epoch":
        flags += ["--data", config.data, "--classes_path", config.classes_path]
    command = [sys.executable, "-m", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def table_lines(row: Row, output: str, machine: Machine, *, with_limit: bool) -> list[str]:
    lines = []
    for figure in row.figures:
        limit = share = ""
        if figure.floor is not None and with_limit:
            counted, floor = figure.floor(machine, output)
            base = number(figure.base, output)
            seconds = 1 / base if figure.unit < 0 else base * figure.unit
            limit = f"{counted}: {1e3 * floor:.3g} ms"
            share = f"{100 * floor / seconds:.0f}% of {1e3 * seconds:.3g} ms"
        measured = number(figure.found, output)
        lines.append(
            f"| {figure.what} | `{row.command}` | {figure.aim} | {measured:g} | {limit} | {share} |"
        )
    return lines


def table(config: Config, machine: Machine, lines: list[str], *, minutes: float) -> str:
    gpu = config.device == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "CPU"
    heading = f"## Table of speed, {config.device}, {datetime.date.today()}"
    small = "\nTiny sizes: the figures mean nothing." if config.small else ""
    return "\n".join(
        (
            f"\n{heading}\n",
            f"`python -m benchmarks.all --device {config.device}`, {minutes:.1f} minutes; {name}, "
            f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}; {machine}."
            f"{small}\n",
            "| what | script | aim | measured | limit | share of the limit |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        )
    )


if __name__ == "__main__":
    run_script(main)
