"""What a worker of the data loader costs in memory, epoch by epoch, from disk and with the cache.

    python -m benchmarks.worker_memory [--num_workers 8 --epochs 10 --data VOCdevkit/MINE:train ...]

Linux only. PSS, the proportional set size, counts a page that n processes share as an nth in each:
that is what a worker costs. `own` are pages that nobody shares: a copy of the cache would be there.
From disk and cached run in processes of their own. Without --data the images are drawn.
"""

import dataclasses
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import epoch
from benchmarks.load_weights import status_bytes
from benchmarks.processes import run_variant
from data.dataset import VocDataset
from data.loader import TrainingLoader
from data.sampler import EpochBatchSampler
from utils.errors import UserError, run_script

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    data: str = ""  # a split, ROOT:SPLIT, in place of 64 drawn images
    classes_path: str = ""  # its class names
    batch_size: int = 8  # images
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    num_workers: int = 2
    epochs: int = 5
    variant: Literal["", "disk", "cached"] = ""  # used by the processes


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("PSS is read from /proc/PID/smaps_rollup: run this on Linux 4.14 or later.")
    if config.num_workers < 1 or config.epochs < 2:
        raise UserError(
            f"--num_workers {config.num_workers} --epochs {config.epochs}: growth shows in 1 "
            "worker or more after 2 epochs or more."
        )
    if config.variant:
        print(json.dumps(measure(config)))
        return
    print(config)
    for variant in ("disk", "cached"):
        report(
            variant,
            run_variant("benchmarks.worker_memory", dataclasses.replace(config, variant=variant)),
        )


def measure(config: Config) -> dict[str, object]:
    """By how much the data set makes the main process grow, then the workers after each epoch."""
    source = epoch.Config(data=config.data, classes_path=config.classes_path)
    with tempfile.TemporaryDirectory() as folder:
        samples, _ = epoch.find_samples(source, Path(folder))
        before = status_bytes("VmRSS")
        cache = config.variant == "cached"
        train_set = VocDataset(samples, config.input_shape, train=True, cache=cache)
        held = status_bytes("VmRSS") - before
        sampler = EpochBatchSampler(len(train_set), config.batch_size)
        loader = TrainingLoader(
            train_set, sampler, num_workers=config.num_workers, pin_memory=False
        )
        epochs = []
        for number in range(config.epochs):
            train_set.set_epoch(number)
            sampler.set_epoch(number)
            for _ in loader:
                pass
            children = multiprocessing.active_children()
            workers = sorted(child.pid for child in children if child.pid is not None)
            epochs.append([worker_memory(pid) for pid in workers])
    return {"held": held, "epochs": epochs}


def worker_memory(pid: int) -> dict[str, int]:
    """Bytes of a process: its proportional set size, and what it shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    bytes_of = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    own = bytes_of["Private_Clean"] + bytes_of["Private_Dirty"]
    return {"pss": bytes_of["Pss"], "own": own}


def report(variant: str, found: dict) -> None:
    print(f"{variant}: the data set takes {found['held'] / MIB:.0f} MiB in the main process")
    for number, workers in enumerate(found["epochs"], start=1):
        pss, own = (
            "  ".join(f"{worker[key] / MIB:6.1f}" for worker in workers) for key in ("pss", "own")
        )
        print(f"  after epoch {number:2d}: PSS of each worker {pss} MiB, own {own} MiB")
    first, last = (
        statistics.mean(worker["pss"] for worker in found["epochs"][index]) for index in (0, -1)
    )
    print(f"  PSS of a worker, last epoch against the first: {last / first:.3f}")


if __name__ == "__main__":
    run_script(main)
