"""The original fork itself beside ours and beside the stand-in that the other benchmarks use.

    git clone https://github.com/bubbliiiing/yolov4-pytorch ../yolov4-pytorch
    python -m benchmarks.original --path ../yolov4-pytorch [--rows loss sample step detect]
    python -m benchmarks.original --path ../yolov4-pytorch --device cuda --amp bf16 \\
        --loss_batch 32 --loss_boxes 50 --step_batch 64

loss: its YOLOLoss over three scales, forward and backward. sample: an item of its data set, mosaic
and HSV from JPEGs of 640 x 480. step: its network, loss and SGD. detect: an image's file to its
boxes as its yolo.py goes, without the drawing. Its own code runs, unchanged, on the inputs of
benchmarks.loss, loader, step and detect; each variant in processes of its own, in turn.
"""

import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import detect, loader, loss, step
from benchmarks.processes import ROOT, call_in_turn, run_json, run_variant
from tests.reference_loss import ANCHORS
from utils.errors import UserError, run_script

CHILD = ROOT / "benchmarks/original_child.py"
CLONE = "git clone https://github.com/bubbliiiing/yolov4-pytorch, then --path yolov4-pytorch"
NEEDED = (
    *("nets/yolo.py", "nets/yolo_training.py"),
    *("utils/dataloader.py", "utils/utils.py", "utils/utils_bbox.py"),
)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    path: str = ""  # folder of a clone of the original
    rows: tuple[str, ...] = ("loss", "sample", "step", "detect")
    device: str = "cpu"  # cpu or cuda; a sample is made on the CPU in any case
    rounds: int = 3  # processes of each variant, in turn
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    loss_batch: int = 8  # images of the loss row
    loss_boxes: int = 15  # its boxes an image
    samples: int = 50  # of the sample row, a process
    images: int = 400  # JPEGs that they are made of: more than a worker keeps decoded
    step_batch: int = 4  # images of the step row
    steps: int = 2  # timed ones of a process
    detections: int = 8  # timed ones of a process
    amp: str = "off"  # of our step: off, bf16 or fp16


@dataclasses.dataclass(frozen=True)
class Row:
    """A benchmark of ours: its module and config, and what writes its inputs for the original."""

    module: str
    settings: Any
    write_inputs: Callable[[Any, Path], None]
    stand_in: str = "fork"
    ours: tuple[str, ...] = ("ours",)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    check_clone(config.path)
    rows = make_rows(config)
    if unknown := set(config.rows) - set(rows):
        raise UserError(f"--rows {' '.join(sorted(unknown))}: choose from {', '.join(rows)}.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    print(f"{config}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    for name in config.rows:
        with tempfile.TemporaryDirectory() as folder:
            found = measure_row(name, rows[name], config, Path(folder))
        report(name, rows[name], found)
        if name == "loss":
            check_totals(found)


def check_clone(path: str) -> None:
    """Raises UserError for a folder that is not the original's."""
    if not path:
        raise UserError(f"--path is not given: the folder of the original. {CLONE}.")
    if not Path(path).is_dir():
        raise UserError(f"--path {path}: there is no such folder. {CLONE}.")
    if missing := [name for name in NEEDED if not Path(path, name).is_file()]:
        raise UserError(f"--path {path}: is not the original: {missing[0]} is missing. {CLONE}.")


def make_rows(config: Config) -> dict[str, Row]:
    """The benchmarks that the original is put beside, in the sizes asked for."""
    shape, device = config.input_shape, config.device
    losses = loss.Config(
        device=device, input_shape=shape, batch_size=config.loss_batch, boxes=config.loss_boxes
    )
    samples = loader.Config(
        input_shape=shape, images=config.images, samples=config.samples, rounds=1
    )
    steps = step.Config(
        device=device,
        input_shape=shape,
        batch_size=config.step_batch,
        steps=config.steps,
        amp=config.amp,
    )
    images = detect.Config(device=device, input_shape=shape, images=config.detections)
    cached = ("ours", "ours, cached")
    return {
        "loss": Row("benchmarks.loss", losses, write_maps, stand_in="reference"),
        "sample": Row("benchmarks.loader", samples, write_images, ours=cached),
        "step": Row("benchmarks.step", steps, write_batch),
        "detect": Row("benchmarks.detect", images, write_network),
    }


def write_maps(settings: loss.Config, folder: Path) -> None:
    maps, targets = loss.make_batch(settings)
    torch.save(([raw.detach() for raw in maps], targets), folder / "batch.pt")


def write_images(settings: loader.Config, folder: Path) -> None:
    """JPEGs, and the fork's annotation lines: the file, then its boxes in whole pixels."""
    lines = []
    for sample in loader.draw_images(folder, settings):
        boxes = [
            ",".join(str(round(float(number))) for number in (*box, class_id))
            for box, class_id in zip(sample.boxes_xyxy, sample.class_ids, strict=True)
        ]
        lines.append(" ".join((Path(sample.image_path).name, *boxes)))
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")


def write_batch(settings: step.Config, folder: Path) -> None:
    torch.save(step.make_batch(settings), folder / "batch.pt")


def write_network(settings: detect.Config, folder: Path) -> None:
    path = detect.draw_image(folder, settings)
    torch.save(detect.random_network(settings, path).state_dict(), folder / "fork.pth")


def measure_row(name: str, row: Row, config: Config, folder: Path) -> dict[str, list[dict]]:
    """What each process of the original, the stand-in and ours gave, in turn."""
    calls = {"original": original_call(name, row, config.path, folder)}
    for label, variant in (("stand-in", row.stand_in), *zip(row.ours, row.ours, strict=True)):
        settings = dataclasses.replace(row.settings, variant=variant)
        calls[label] = functools.partial(run_variant, row.module, settings)
    return call_in_turn(calls, config.rounds)


def original_call(name: str, row: Row, clone: str, folder: Path) -> Callable[[], dict]:
    """Write the inputs; what runs the original on them, in `folder`, where its files are named."""
    row.write_inputs(row.settings, folder)
    metadata = {
        "row": name,
        "device": getattr(row.settings, "device", "cpu"),
        "anchors": ANCHORS,
        "threads": torch.get_num_threads(),
    }
    limits = {"lowest": detect.LOWEST, "nms_iou": detect.NMS_IOU}
    job = json.dumps({**dataclasses.asdict(row.settings), **metadata, **limits})
    (folder / "job.json").write_text(job, encoding="utf-8")
    # Our own folder must not come in by PYTHONPATH; the clone is left as it is, without caches.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, CHILD, Path(clone).resolve()]
    return functools.partial(run_json, command, cwd=folder, env=env)


def report(name: str, row: Row, found: dict[str, list[dict]]) -> None:
    """Medians over the processes, and ratios."""
    seconds = {
        label: statistics.median(one["seconds"] for one in results)
        for label, results in found.items()
    }
    for label, taken in seconds.items():
        print(f"{name:7s}{label:13s}{1e3 * taken:10.2f} ms{details(found[label])}")
    original = seconds["original"]
    for label in row.ours:
        print(f"{name:7s}ratio {original / seconds[label]:.2f} (original / {label})")
    print(f"{name:7s}stand-in {seconds['stand-in'] / original:.2f} x the original's time")


def details(results: list[dict]) -> str:
    """Of one variant: what it gave beside the time."""
    texts = {
        "total": lambda value: f", total {value:.6f}",
        "boxes": lambda value: f", {value:.0f} boxes",
        "peak": lambda value: f", {value / MIB:.0f} MiB above the idle process",
    }
    values = {key: statistics.median(one[key] for one in results) for key in results[0]}
    return "".join(texts[key](value) for key, value in values.items() if key in texts)


def check_totals(found: dict[str, list[dict]]) -> None:
    """Raises UserError where ours is not the original's loss."""
    original, ours = found["original"][0]["total"], found["ours"][0]["total"]
    if not abs(ours - original) <= 1e-4 * abs(original):
        raise UserError(f"the losses differ: {original} in the original, {ours} in ours.")


if __name__ == "__main__":
    run_script(main)
