"""Does everything work on this GPU, and how fast? `make gpu`, or python -m benchmarks.gpu_check.

Checks that are likely to fail come first; after a failure the others go on. The last lines are a
table to paste. Without a GPU all runs small on the CPU, and its figures mean nothing.
"""

import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from benchmarks import step as step_benchmark
from engine.optimizer import Ema, build_optimizer
from engine.settings import amp_dtype
from engine.trainer import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.memory import move
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS
from tools.make_sample_voc import make_sample
from utils.distributed import data_parallel
from utils.errors import UserError, run_script, summarise

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    minutes: float = 9.0  # after which no further check begins, and the running one is ended
    only: tuple[str, ...] = ()  # names of checks; default: all
    original: str = ""  # folder of a clone of the original fork, to be measured beside ours
    part: str = ""  # used by the processes of the checks


class CheckError(Exception):
    """What a check found."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where the checks run."""

    device: str
    folder: Path
    deadline: float
    original: str

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def run(self, *words: object, status: int = 0) -> str:
        """What a command prints. Raises CheckError for another exit status or out of time."""
        command = [sys.executable, *map(str, words)]
        left = max(1.0, self.deadline - time.monotonic())
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            raise CheckError(f"out of time: {' '.join(command[1:4])}") from None
        if done.returncode != status:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise CheckError(f"{' '.join(command[1:4])}: status {done.returncode}: {''.join(last)}")
        return done.stdout + done.stderr

    def part(self, name: str) -> dict[str, float]:
        """What a part of this file measures, in a process of its own."""
        lines = self.run("-m", "benchmarks.gpu_check", "--part", name).splitlines()
        return json.loads(next(line for line in lines if line.startswith("{")))

    def train(self, name: str, *flags: object, status: int = 0) -> str:
        """A short training on a drawn sample, in logs of its own."""
        size: tuple[object, ...] = ("--width", 0.1, "--depth", 0.1, "--input_shape", 96, 96)
        if not self.small:
            size = ("--width", 0.5, "--depth", 0.34, "--input_shape", 256, 256)
        data = self.folder / "Sample"
        if not data.exists():
            make_sample(data, images=60, seed=0, difficulty="easy", progress=False)
        splits = ("--train", f"{data}:train", "--val", f"{data}:val")
        names = ("--classes_path", data / "classes.txt", "--save_dir", self.folder / name)
        workers = ("--num_workers", 2, "--eval_period", 1)
        return self.run("train.py", *splits, *names, *size, *workers, *flags, status=status)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if config.part:
        print(json.dumps(PARTS[config.part]("cuda" if torch.cuda.is_available() else "cpu")))
        return
    if unknown := set(config.only) - set(CHECKS):
        raise UserError(f"--only {summarise(sorted(unknown))}: choose from {', '.join(CHECKS)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        deadline = start + 60 * config.minutes
        bench = Bench(device, Path(folder), deadline, config.original)
        chosen = {name: CHECKS[name] for name in config.only or CHECKS}
        for name, check in tqdm(chosen.items(), unit="check"):
            lines.append(f"| {name} | {judge(check, bench)} |")
            tqdm.write(lines[-1])
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU, small"
    print(f"\n{gpu}, torch {torch.__version__}, {(time.monotonic() - start) / 60:.1f} minutes\n")
    print("\n".join(("| check | result | what was found |", "|---|---|---|", *lines)))
    if any("| failed |" in line for line in lines):
        sys.exit(1)


def judge(check: Callable[[Bench], str], bench: Bench) -> str:
    """The result of a check and what it found, as two cells of the table."""
    if time.monotonic() > bench.deadline:
        return "skipped | out of time"
    start = time.monotonic()
    try:
        found = check(bench)
    except CheckError as error:
        return f"failed | {str(error).replace('|', '/')}"
    except Exception as error:  # one broken check must not hide the others
        return f"failed | {type(error).__name__}: {str(error).replace('|', '/')}"
    result = "skipped" if found.startswith("skipped") else "passed"
    return f"{result} | {found} ({time.monotonic() - start:.0f} s)"


def tests(bench: Bench) -> str:
    chosen = ("-k", "test_no_operation_of_a_step") if bench.small else ("-m", "cuda")
    output = bench.run("-m", "pytest", *chosen, "tests", "-p", "no:cacheprovider")
    return next(line for line in output.splitlines() if " passed" in line).strip("= ")


def trainings(bench: Bench) -> str:
    """Multi-scale, ghm and cache; resumed on the CPU, and back in half precision."""
    own = ("--multi_scale", 0.4, "--conf_loss", "ghm", "--cache", "--epochs", 2)
    bench.train("run", *own, "--device", bench.device)
    resume = ("train.py", "--resume", bench.folder / "run")
    bench.run(*resume, "--epochs", 3, "--device", "cpu", "--amp", "off")
    half = "off" if bench.small else "fp16"
    bench.run(*resume, "--epochs", 4, "--device", bench.device, "--amp", half)
    return f"4 epochs: {bench.device}, cpu, {bench.device} {half}"


def detection(bench: Bench) -> str:
    best, data = bench.folder / "run" / "best.pt", bench.folder / "Sample"
    weights = ("--weights", best, "--device", bench.device)
    bench.run("evaluate.py", *weights, "--data", f"{data}:val", "--save_dir", bench.folder / "ev")
    source = ("--source", data / "JPEGImages", "--save_dir", bench.folder / "found")
    bench.run("predict.py", *weights, *source)
    return "evaluate.py and predict.py ran"


def deterministic(bench: Bench) -> str:
    own, states = ("--deterministic", "--epochs", 1, "--device", bench.device), []
    for name in ("one", "two"):
        bench.train(name, *own)
        states.append(torch.load(bench.folder / name / "last.pt", weights_only=True)["raw_model"])
    different = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    if different:
        raise CheckError(f"{len(different)} of {len(states[0])} tensors differ")
    return "equal weights"


def out_of_memory(bench: Bench) -> str:
    if bench.small:
        return "skipped: needs a GPU"
    flags = ("--batch_size", 30000, "--epochs", 1, "--device", "cuda", "--num_workers", 0)
    output = bench.train("full", *flags, status=2)
    if "memory is not enough" not in output:
        raise CheckError(f"no message: {output.splitlines()[-1]}")
    return "one message, exit status 2"


def loss(bench: Bench) -> str:
    size = ("--batch_size", 1, "--boxes", 2, "--rounds", 1)
    if not bench.small:
        size = ("--batch_size", 32, "--boxes", 50, "--rounds", 10)
    output = bench.run("-m", "benchmarks.loss", "--device", bench.device, *size)
    ratio = re.search(r"ratio [\d.]+", output)
    milliseconds = re.search(r"ours\s+median\s+([\d.]+) ms", output)
    assert ratio is not None
    assert milliseconds is not None
    waits = "waits for nothing" if "no synchronisation" in output else "waiting not checked"
    return f"{milliseconds[1]} ms, {ratio[0]} to the plain reference, {waits}"


def steps(bench: Bench) -> str:
    found, texts = bench.part("steps"), []
    for batch in batches_of(bench.device):
        ms, share, gb = (found[f"{name}_{batch}"] for name in ("ms", "share", "gb"))
        texts.append(f"batch {batch}: {ms:.1f} ms, {share:.0%} of the matrix rate, {gb:.1f} GB")
    return "; ".join(texts)


def cells(bench: Bench) -> str:
    return f"{bench.part('cells')['ratio']:.3f} of a plain step"


def ranks(bench: Bench) -> str:
    found = bench.part("ddp")
    text = f"a world of one: {found['ratio']:.3f} of a plain step"
    if torch.cuda.device_count() > 1:
        flags = ("--nproc_per_node=2", "train.py", "--resume", bench.folder / "run")
        bench.run("-m", "torch.distributed.run", "--standalone", *flags, "--epochs", 5)
        text += "; two GPUs trained"
    return text


def memory(bench: Bench) -> str:
    grown = bench.part("memory")["grown_mb"]
    if grown > 1:
        raise CheckError(f"{grown:.0f} MB more after the last steps than after the first 50")
    return f"{grown:.1f} MB more after the last steps than after the first 50"


def beside_original(bench: Bench) -> str:
    if not bench.original:
        return "skipped: --original is not given"
    sizes: tuple[object, ...] = (
        "--loss_batch",
        32,
        "--loss_boxes",
        50,
        "--step_batch",
        64,
        "--amp",
        "bf16",
    )
    if bench.small:
        sizes = ("--loss_batch", 1, "--step_batch", 1, "--input_shape", 64, 64)
    path = ("--path", bench.original, "--device", bench.device, "--rounds", 1, "--rows", "loss")
    output = bench.run("-m", "benchmarks.original", *path, "step", "detect", *sizes)
    return "; ".join(line.strip() for line in output.splitlines() if "original" in line)


CHECKS: dict[str, Callable[[Bench], str]] = {
    "tests": tests,
    "loss": loss,
    "steps": steps,
    "training": trainings,
    "detection": detection,
    "ranks": ranks,
    "deterministic": deterministic,
    "out of memory": out_of_memory,
    "cells": cells,
    "memory": memory,
    "original": beside_original,
}


def batches_of(device: str) -> tuple[int, int]:
    return (8, 64) if device == "cuda" else (1, 2)


def make_step(device: str, batch: int) -> tuple[TrainStep, step_benchmark.Config, Any]:
    """A step as train.py makes it, of full size on a GPU, and a batch for it."""
    gpu = torch.backends.cudnn.benchmark = device == "cuda"
    shape = (416, 416) if gpu else (64, 64)
    config = step_benchmark.Config(device=device, batch_size=batch, input_shape=shape)
    size = {} if gpu else {"width": 0.1, "depth": 0.1}
    model = move(YoloV4(config.num_classes, **size), device).train()
    step = TrainStep(
        model=model,
        loss=YOLOLoss(ANCHORS, config.num_classes, shape, assigner="neighbours").to(device),
        optimizer=build_optimizer("adamw", model),
        ema=Ema(model, 0.9998),
        device=torch.device(device),
        amp_dtype=amp_dtype("auto", torch.device(device)),
        clip_norm=10.0,
    )
    return step, config, step_benchmark.make_batch(config)


def seconds(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median of a call, after three more."""
    found = []
    for _ in range(3 + (repeats if device == "cuda" else 2)):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[3:])


def measure_steps(device: str) -> dict[str, float]:
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    rate = 2 * side**3 / seconds(lambda: matrix @ matrix, device)
    found = {}
    for batch in batches_of(device):
        step, config, data = make_step(device, batch)
        taken = seconds(functools.partial(step, *data), device)
        found[f"ms_{batch}"] = 1e3 * taken
        found[f"share_{batch}"] = step_benchmark.work(config) / taken / rate
        used = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        found[f"gb_{batch}"] = used / 1e9
    return found


def measure_cells(device: str) -> dict[str, float]:
    step, _, data = make_step(device, batches_of(device)[0])
    plain = seconds(lambda: step(*data), device)
    return {"ratio": seconds(lambda: step(*data, cells=True), device) / plain}


def measure_ddp(device: str) -> dict[str, float]:
    step, _, data = make_step(device, batches_of(device)[0])
    plain = seconds(lambda: step(*data), device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    gpu = torch.device("cuda", 0) if device == "cuda" else None
    dist.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1, device_id=gpu)
    step.network = data_parallel(step.model)
    ratio = seconds(lambda: step(*data), device) / plain
    dist.destroy_process_group()
    return {"ratio": ratio}


def measure_memory(device: str) -> dict[str, float]:
    step, _, (images, targets) = make_step(device, batches_of(device)[0])
    allocated, count = [0], 500 if device == "cuda" else 4
    for number in range(count):
        step(images, targets[: 1 + number % len(targets)]).read()
        if device == "cuda" and number in (50, count - 1):
            allocated.append(torch.cuda.memory_allocated())
    return {"grown_mb": (allocated[-1] - allocated[-2]) / 1e6 if device == "cuda" else 0.0}


PARTS: dict[str, Callable[[str], dict[str, float]]] = {
    "steps": measure_steps,
    "cells": measure_cells,
    "ddp": measure_ddp,
    "memory": measure_memory,
}


if __name__ == "__main__":
    run_script(main)
