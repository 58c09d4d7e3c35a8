"""Time and memory of loading a darknet file of the full network, beside merely reading it.

    python -m benchmarks.load_weights

The work: each of the file's bytes is read twice, once to look for NaN and once to copy it into
the network. The reference reads the file once into new memory with numpy. The file is warm in
the page cache, and the peak of resident memory counts the mapped file as well (Linux only).
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro

from nets.yolo import YoloV4
from utils.errors import run_script
from weights.darknet import save_darknet_weights
from weights.loading import load_weights

STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Config:
    num_classes: int = 80
    repeats: int = 7


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    model = YoloV4(config.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.weights"
        save_darknet_weights(model, path)
        size = os.path.getsize(path)
        print(f"{size:,} bytes")
        peak = peak_growth(lambda: load_weights(model, path))
        if peak is not None:
            print(f"peak memory over the model: {peak / size:.2f} x the file")
        load = median_seconds(lambda: load_weights(model, path), config.repeats)
        read = median_seconds(lambda: np.fromfile(path, np.uint8), config.repeats)
    print(f"load {load:.3f} s, reading alone {read:.3f} s: ratio {load / read:.2f}")


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of several runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_growth(run: Callable[[], object]) -> int | None:
    """By how many bytes resident memory rises at most during a run; None where not measurable."""
    if not RESET_PEAK.exists():
        return None
    RESET_PEAK.write_text("5")  # sets the peak, VmHWM, to what is resident now
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A memory figure of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_script(main)
