"""Evaluate a trained detector: python evaluate.py --weights logs/RUN/best.pt

For weights of darknet or of the original fork add --classes_path NAMES --cfg CFG, or --anchors_path
and --input_shape instead of --cfg. The error message lists the flags to add.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from data.voc import scan_split
from metrics.calibration import OperatingPoint, is_measured
from metrics.evaluator import evaluate
from metrics.plots import plot_precision_recall, plot_reliability
from metrics.scoring import Evaluation, format_table
from utils.distributed import select_device
from utils.errors import UserError, run_script
from utils.memory import FittingBatch
from weights.checkpoint import build_model
from weights.foreign import FileMetadata, MetadataFlags, read_network


@dataclasses.dataclass(frozen=True)
class Config:
    # Edit the values here, or give them as flags. Each comment is the help text of its flag.
    weights: str = ""  # best.pt or last.pt of a run, darknet .weights, or the original fork's .pth
    data: str = "VOCdevkit/VOC2007:test"  # split to evaluate, as ROOT:SPLIT; join several with +
    save_dir: str = ""  # folder for the results; default: logs/evaluate-<time>
    device: str = ""  # cpu, cuda or cuda:N; default: CUDA when available
    batch_size: int = 8  # images per batch
    num_workers: int = 2  # data loading processes; 0 loads in the main process
    skip_bad: bool = False  # skip unreadable images and annotations instead of stopping
    include_difficult: bool = False  # count objects marked difficult, which are ignored otherwise
    metadata: MetadataFlags = dataclasses.field(default_factory=FileMetadata)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if not config.weights:
        raise UserError(
            "No weights given. Use --weights logs/RUN/best.pt, a file of your training, or "
            "weights of darknet or the original fork."
        )
    if config.batch_size < 1 or config.num_workers < 0:
        raise UserError(
            f"--batch_size {config.batch_size}, --num_workers {config.num_workers}: give at least "
            "1 and 0."
        )
    device = select_device(config.device)
    checkpoint = read_network(config.weights, config.metadata)
    model = build_model(checkpoint, device)
    folder = Path(config.save_dir or time.strftime("logs/evaluate-%Y%m%d-%H%M%S"))

    samples, report = scan_split(
        config.data,
        checkpoint["class_names"],
        skip_bad=config.skip_bad,
        include_difficult=config.include_difficult,
        split_dir=folder,
        classes_path=config.metadata.classes_path or config.weights,
        progress=True,
    )
    print(report)
    make_folder(folder)

    evaluation = FittingBatch(config.batch_size).run(
        lambda batch_size: evaluate(
            model,
            samples,
            class_names=checkpoint["class_names"],
            anchors=checkpoint["anchors"],
            input_shape=tuple(checkpoint["input_shape"]),
            scale_xy=checkpoint["scale_xy"],
            device=device,
            batch_size=batch_size,
            num_workers=config.num_workers,
        )
    )
    fixed = evaluation.at_threshold(checkpoint["conf_threshold"])
    print(format_table(evaluation))
    print(format_fixed(fixed, checkpoint, config.data))
    print(f"{evaluation.images_per_second:.1f} images/s, reading included, on {device}")
    write_results(folder, evaluation, fixed, config)
    print(f"wrote evaluation.json, precision_recall.png and reliability.png to {folder}")


def format_fixed(fixed: OperatingPoint, checkpoint: Mapping[str, Any], data: str) -> str:
    """The honest line: this split's own best F1 is chosen on it, the checkpoint's elsewhere."""
    chosen_on = checkpoint["config"].get("val", "")
    origin = "chosen on this split" if chosen_on == data else f"chosen on {chosen_on}"
    if not is_measured(checkpoint["metrics"]):
        origin = "a default: no evaluation has measured the threshold of best F1"
    return (
        f"F1 {fixed.f1:.4f} at the checkpoint's score >= {fixed.conf_threshold:.4f} ({origin}): "
        f"precision {fixed.precision:.4f}, recall {fixed.recall:.4f}"
    )


def make_folder(folder: Path) -> None:
    """Make the folder for the results before the work that they cost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_dir {folder}: cannot make the folder ({error}).") from None


def write_results(
    folder: Path, evaluation: Evaluation, fixed: OperatingPoint, config: Config
) -> None:
    """evaluation.json and the two images; those of an earlier evaluation are replaced."""
    results = {
        **evaluation.to_json(),
        "at_checkpoint_threshold": fixed._asdict(),
        "config": dataclasses.asdict(config),
    }
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    path = folder / "precision_recall.png"
    plot_precision_recall(path, evaluation.curves, evaluation.per_class)
    plot_reliability(
        folder / "reliability.png",
        evaluation.reliability,
        ece=evaluation.ece,
        thresholds={
            "best F1 here": evaluation.conf_threshold,
            "the checkpoint's": fixed.conf_threshold,
        },
    )


if __name__ == "__main__":
    run_script(main)
