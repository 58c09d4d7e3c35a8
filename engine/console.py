"""Terminal output of a training: at the start, during the steps, at the end."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine.settings import TrainingSettings
from engine.statistics import TERMS, EpochStatistics, memory_gb
from losses.yolo_loss import YOLOLoss
from utils.distributed import is_main, world_size

NOTHING_LEARNT = 0.01  # AP50


def describe(
    model: nn.Module,
    loss: YOLOLoss,
    settings: TrainingSettings,
    *,
    metadata: Mapping[str, Any],
    device: torch.device,
    folder: Path,
) -> str:
    """What is about to be trained, with the numbers that were derived from the constants.

    metadata: as the Trainer takes them.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precision = str(settings.amp_dtype or torch.float32).removeprefix("torch.")
    network = (
        f"YOLOv4, width {metadata['width']}, depth {metadata['depth']}, {parameters:,} parameters"
    )
    lines = [
        f"network: {network}",
        f"decode: scale_xy {' '.join(map(str, metadata['scale_xy']))} at strides 8, 16, 32",
        f"device: {world_size()} x {name}, {precision}",
        f"confidence loss: {metadata['conf_loss']} ({loss.conf_settings}, target of a positive: "
        f"{objectness_target(loss.iou_target)})",
        f"{settings}",
        f"run folder: {folder}",
    ]
    return "\n".join(lines)


def objectness_target(ratio: float) -> str:
    """What a positive's objectness is to become, for YOLOLoss's iou_target."""
    return {0.0: "1", 1.0: "the IoU of its box"}.get(ratio, f"{1 - ratio:g} + {ratio:g} IoU")


def progress_bar(epoch: int, epochs: int, *, done: int, steps: int) -> tqdm:
    """The bar of an epoch, counted from 0, on the main process alone."""
    return tqdm(
        total=steps,
        initial=done,
        desc=f"epoch {epoch + 1}/{epochs}",
        leave=False,
        disable=not is_main(),
    )


def progress_text(
    statistics: EpochStatistics,
    *,
    lr: float,
    input_size: tuple[int, int] | None,
    device: torch.device,
) -> str:
    """What stands behind the progress bar; input_size (height, width) where it changes."""
    text = " ".join(f"{name} {statistics.mean(name):.3f}" for name in TERMS)
    text += f" lr {lr:.2e}"
    if input_size is not None:
        text += " {}x{}".format(*input_size)
    text += f" {statistics.images_per_second() * world_size():.1f} images/s"
    return f"{text} {memory_gb(device):.1f} GB"


def slow_start(rows: Sequence[Mapping[str, str]], *, epochs: int, best_ap50: float) -> str:
    """What to print when a quarter of the training has taught it nothing; "" else.

    Args:
        rows: The lines of metrics.csv so far.
        epochs: Total epochs.
        best_ap50: The best validation AP50 so far.
    """
    done = len(rows)
    if done < max(5, epochs / 4) or not best_ap50 < NOTHING_LEARNT:
        return ""
    first, last, steps = float(rows[0]["loss"]), float(rows[-1]["loss"]), rows[-1]["step"]
    return (
        f"note: AP50 is still below {NOTHING_LEARNT:g} after {done} epochs ({steps} steps); the "
        f"loss went from {first:.3g} to {last:.3g}. From scratch a detector needs thousands of "
        "steps: give more --epochs, or start from --weights. If the loss has not moved, look at "
        "train_batch.jpg (are the boxes on their objects?) and at --lr."
    )


def how_to_go_on(folder: Path, conf_loss: str) -> str:
    """Message after Ctrl-C."""
    return f"stopped; resume with:\n  {resume_command(folder, conf_loss)}"


def resume_command(run: str | Path, conf_loss: str) -> str:
    """The command that resumes; a loss of the user's own is run only when named again.

    run: its folder or last.pt.
    """
    own = f" --conf_loss {shlex.quote(conf_loss)}" if ":" in conf_loss else ""
    return f"python train.py --resume {shlex.quote(str(run))}{own}"


def how_to_use(folder: Path, val: str) -> str:
    """The commands that evaluate and predict with what was trained."""
    images = shlex.quote(f"{val.split('+')[0].rpartition(':')[0]}/JPEGImages")
    best = shlex.quote(str(folder / "best.pt"))
    lines = [
        f"done. Curves and images: {folder}",
        f"  python evaluate.py --weights {best} --data {shlex.quote(val)}",
        f"  python predict.py --weights {best} --source {images}",
    ]
    return "\n".join(lines)
