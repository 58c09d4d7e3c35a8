"""The rows of benchmarks/all.py: scripts, aims, and the work that a machine cannot do without."""

import dataclasses
import re
from collections.abc import Callable

from tools.summary import convolution_flops, meta_model, trace_layers
from utils.errors import UserError

INPUT = (416, 416)
NUMBER = r"([\d,]+\.?\d*)"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates measured in this run."""

    flops: float  # a second, matrix products
    copied_bytes: float  # a second, read and written
    number_type: str  # of the matrices

    def __str__(self) -> str:
        copies = f"copies of {self.copied_bytes / 1e9:.0f} GB/s"
        return f"{self.flops / 1e9:,.0f} GFLOP/s of {self.number_type}, {copies}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table. found, base: patterns in the script's output whose groups are the
    ratio and the seconds (or, times `unit`, something else) that the limit is compared with."""

    what: str
    aim: str
    found: str
    base: str = ""
    unit: float = 1.0
    floor: Callable[[Machine, str], tuple[str, float]] | None = None  # counted work, seconds


@dataclasses.dataclass(frozen=True)
class Row:
    command: str  # behind python -m
    figures: tuple[Figure, ...]
    small: str  # flags of a tiny run


def network_flops() -> float:
    """Of one image's forward pass, full size, 20 classes."""
    return convolution_flops(trace_layers(meta_model(20), INPUT))


def number(pattern: str, output: str) -> float:
    """What a benchmark has printed. Raises UserError where it has not."""
    found = re.search(pattern, output)
    if found is None:
        raise UserError(f"no line like {pattern!r} in the output of a benchmark:\n{output}")
    return float(found[1].replace(",", ""))


def forward_floor(machine: Machine, _: str) -> tuple[str, float]:
    work = network_flops()
    return f"{work / 1e9:.0f} GFLOP of convolution", work / machine.flops


def step_floor(machine: Machine, output: str) -> tuple[str, float]:
    """Forward, gradient of the inputs, gradient of the weights: three times the forward's work."""
    batch = int(number(r"batch_size=(\d+)", output))
    work = 3 * batch * network_flops()
    return f"{work / 1e9:,.0f} GFLOP of convolution", work / machine.flops


def loss_floor(machine: Machine, output: str) -> tuple[str, float]:
    """Gradients are written once; the five numbers of each cell that all need share a cache line
    or two of 64 bytes, read forward and written backward."""
    gradients = 1e6 * number(rf"writes {NUMBER} MB", output)
    batch = int(number(r"batch_size=(\d+)", output))
    lines = 3 * 1.3 * 64 * batch * sum((INPUT[0] // s) * (INPUT[1] // s) for s in (8, 16, 32))
    total = gradients + 2 * lines
    return f"{total / 1e6:.0f} MB", total / machine.copied_bytes


def loader_floor(pattern: str) -> Callable[[Machine, str], tuple[str, float]]:
    """What the loader's own script has timed: the parts that no sample can do without."""

    def floor(_: Machine, output: str) -> tuple[str, float]:
        return pattern, number(rf"{pattern} {NUMBER} ms", output) / 1e3

    return floor


LOSS = Figure(
    what="loss, forward and backward, batch 8, 80 classes",
    aim="8 x",
    found=rf"ratio {NUMBER}",
    base=rf"ours\s+median\s+{NUMBER} ms",
    unit=1e-3,
    floor=loss_floor,
)
DETECTION = Figure(
    what="image to boxes, batch 1, 150 boxes kept by both",
    aim="1.4 x",
    found=rf"ratio {NUMBER} \(fork",
    base=rf"ours\s+{NUMBER} ms",
    unit=1e-3,
    floor=forward_floor,
)
STEP = Figure(
    what="training step, full network, batch 4",
    aim="1.4 x",
    found=rf"time\s+{NUMBER}",
    base=rf"ours\s+{NUMBER} ms",
    unit=1e-3,
    floor=step_floor,
)
MEMORY = Figure(what="its peak memory", aim="at most .55", found=rf"memory\s+{NUMBER}")

CPU_ROWS = (
    Row(
        "benchmarks.loss",
        (LOSS,),
        small="--rounds 1 --batch_size 1",
    ),
    Row(
        "benchmarks.loader --rounds 5",
        (
            Figure(
                what="mosaic sample from disk, drawn JPEG",
                aim="5 x",
                found=rf"ours  .*?{NUMBER} x the fork's",
                base=rf"ours  .*?{NUMBER} samples/s",
                unit=-1,
                floor=loader_floor("one decode, resizes and HSV"),
            ),
            Figure(
                what="the same, cached",
                aim="15 x",
                found=rf"ours, cached.*?{NUMBER} x the fork's",
                base=rf"ours, cached.*?{NUMBER} samples/s",
                unit=-1,
                floor=loader_floor("four resizes and HSV"),
            ),
        ),
        small="--rounds 1 --samples 4 --images 8",
    ),
    Row(
        "benchmarks.detect",
        (DETECTION,),
        small="--input_shape 96 96 --rounds 1 --images 1 --boxes 9",
    ),
    Row(
        "benchmarks.step --rounds 2",
        (
            STEP,
            MEMORY,
        ),
        small="--input_shape 64 64 --rounds 1 --steps 1 --batch_size 1",
    ),
    Row(
        "benchmarks.average_precision",
        (
            Figure(
                what="mAP of 5,000 images x 100 boxes x 20 classes, pycocotools",
                aim="10 x",
                found=rf"ours, COCO  .*?{NUMBER} x as fast",
            ),
        ),
        small="--images 50",
    ),
)

CUDA_ROWS = (
    Row(
        "benchmarks.loss --device cuda --batch_size 32 --boxes 50",
        (
            dataclasses.replace(
                LOSS, what="loss, forward and backward, batch 32, 50 boxes", aim="100 x"
            ),
        ),
        small="--rounds 1 --batch_size 1 --boxes 2",
    ),
    Row(
        "benchmarks.step --device cuda --batch_size 64 --amp bf16 --steps 10",
        (
            dataclasses.replace(
                STEP, what="training step, bf16, batch 64, against float32", aim="10 x"
            ),
            dataclasses.replace(MEMORY, aim=""),
        ),
        small="--input_shape 64 64 --rounds 1 --steps 1 --batch_size 1",
    ),
    Row(
        "benchmarks.step --device cuda --network --batch_size 64 --amp bf16 --steps 10",
        (
            dataclasses.replace(
                STEP,
                what="network alone, forward and backward, bf16, batch 64, against float32 "
                "(convolutions in TF32)",
                aim="2.5 x",
            ),
        ),
        small="--input_shape 64 64 --rounds 1 --steps 1 --batch_size 1",
    ),
    Row(
        "benchmarks.detect --device cuda --images 30",
        (
            dataclasses.replace(
                DETECTION, what="image to boxes, batch 1, float32 in both, 150 boxes", floor=None
            ),
        ),
        small="--input_shape 96 96 --rounds 1 --images 1 --boxes 9",
    ),
    Row(
        "benchmarks.detect --device cuda --images 30 --amp fp16",
        (
            dataclasses.replace(
                DETECTION, what="the same, ours in half precision", aim="", floor=None
            ),
        ),
        small="--input_shape 96 96 --rounds 1 --images 1 --boxes 9",
    ),
    Row(
        "benchmarks.cells --device cuda --width 1 --depth 1 --batch_size 16",
        (
            Figure(
                what="a step with a look at the cells, against one without",
                aim="at most 1.2",
                found=rf"ratio {NUMBER}",
            ),
        ),
        small="--rounds 1 --width 0.1 --depth 0.1 --batch_size 1 --input_shape 64 64",
    ),
    Row(
        "benchmarks.epoch --device cuda --batch_size 64 --num_workers 16 --amp bf16 --cache",
        (
            Figure(
                what="an epoch from the loader, against one batch repeated",
                aim="at least .95",
                found=rf"ratio {NUMBER}",
            ),
        ),
        small="--width 0.1 --depth 0.1 --input_shape 64 64 --steps 2 --num_workers 1 "
        "--batch_size 2",
    ),
)
