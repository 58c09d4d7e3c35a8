"""A run's folder: config.json, metrics.csv, TensorBoard events, curves and images."""

import csv
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.ops import box_convert

from data.image import read_image, resize
from data.letterbox import image_to_letterbox, letterbox
from data.voc import Sample
from engine.settings import INPUT_COLUMNS
from engine.statistics import CONF_ALPHA, COUNTS, NO_GROUPS, TERMS, cell_statistics
from metrics.plots import plot_cumulative_loss, plot_losses, plot_map, plot_reliability
from metrics.scoring import EVAL_CONF_THRESHOLD, EVAL_NMS_IOU, JUDGED, Evaluation
from utils.draw import draw_boxes, image_grid
from utils.errors import UserError
from utils.overlap import Behind

WAITING = 8  # drawings and checkpoints of an epoch
PLOT_SECONDS = 60  # between drawings of the curves, besides those after a validation
COLUMNS = (
    *("epoch", "step", "lr", "loss", "loc", "conf", "cls"),
    *("val_loss", "val_ap50", "val_ap", "val_ap75", "val_loc", "val_conf", "val_cls"),
    *(*JUDGED, "positives", "ignored", CONF_ALPHA),
    *("grad_norm", "skipped_steps", "images_per_second", "memory_gb", "seconds"),
    *cell_statistics(NO_GROUPS),
)


def new_run_folder(save_dir: str, prefix: str = "logs") -> Path:
    """Make the folder of a run: `save_dir` itself, which must be empty, or prefix/<time>.

    Raises UserError if it holds anything or cannot be made.
    """
    if save_dir:
        folder = Path(save_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            resume = f", or resume it with --resume {folder}"
            raise UserError(
                f"{folder} is not an empty folder. Give another --save_dir, or empty it"
                f"{resume if (folder / 'last.pt').is_file() else ''}."
            )
        return _make(folder, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        folder = Path(prefix) / (f"{stamp}-{number}" if number else stamp)
        if not folder.exists():
            return _make(folder, exist_ok=False)
    raise UserError(f"{prefix} already holds 100 runs of this second. Give --save_dir.")


@contextmanager
def removed_if_unused(folder: Path) -> Iterator[None]:
    """A UserError or Ctrl-C in the block removes the folder, if it is still empty."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        with suppress(OSError):  # something lies in it
            folder.rmdir()
        raise


def _make(folder: Path, *, exist_ok: bool) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder ({error}).") from None
    return folder


class RunLog:
    """Writes what a run measures. One row an epoch in metrics.csv, the same in TensorBoard.

    On a resume the rows after `last_epoch` are dropped: they are about to be written again.
    Use it in a `with` block: in it, no other process may write to the folder.
    Raises UserError if one does.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], last_epoch: int = 0):
        self.folder = folder
        self._lock = folder / "running.pid"
        lock(self._lock)
        text = json.dumps(dict(config), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        self._alpha_told, self._drawn = False, -math.inf
        self.rows = read_metrics(folder / "metrics.csv", last_epoch)
        self._rewrite()
        self.tensorboard = SummaryWriter(str(folder), purge_step=None)
        self.behind = Behind(limit=WAITING)  # what is drawn and saved while training goes on

    def _rewrite(self) -> None:
        with open(self.folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def epoch(self, row: Mapping[str, Any]) -> str:
        """Append an epoch's row, at times redraw the curves. Returns the row as a line to print."""
        text = {key: _format(row.get(key)) for key in COLUMNS}
        self.rows.append(text)
        with open(self.folder / "metrics.csv", "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(text)
        own = {key: value for key, value in row.items() if key not in ("epoch", "step")}
        for key, value in own.items():
            of_validation = key.startswith("val_") or key in JUDGED
            self._scalar(f"{'val' if of_validation else 'train'}/{key}", value, row["step"])
        self.tensorboard.flush()
        if "val_ap50" in row or time.monotonic() - self._drawn > PLOT_SECONDS:
            self.behind(self._draw_curves, [*self.rows])
            self._drawn = time.monotonic()
        return describe(row)

    def _draw_curves(self, rows: Sequence[Mapping[str, str]]) -> None:
        plot_losses(self.folder / "loss.png", rows)
        plot_map(self.folder / "map.png", rows)

    def step(self, step: int, statistics: Mapping[str, float], groups: Sequence[float]) -> str:
        """A step's loss terms, input size if it changes, and cells by groups, to TensorBoard.

        Returns what to print, the first time: the alpha that alpha="auto" has measured.
        """
        for name in (*TERMS, *COUNTS, "grad_norm", CONF_ALPHA, *INPUT_COLUMNS):
            self._scalar(f"step/{name}", statistics.get(name), step)
        for name, value in cell_statistics(groups).items():
            scale, _, figure = name.partition("_")
            self._scalar(f"cells_{scale}/{figure}", value, step)
        alpha, told, self._alpha_told = statistics.get(CONF_ALPHA), self._alpha_told, True
        if alpha is None or told:
            return ""
        return (
            f'alpha="auto" weighs positives by {alpha:.5g}, negatives by {1 - alpha:.5g} so far; '
            f"{CONF_ALPHA} in metrics.csv and TensorBoard follows it"
        )

    def _scalar(self, name: str, value: float | None, step: int) -> None:
        if value is not None and math.isfinite(value):
            self.tensorboard.add_scalar(name, value, step)

    def evaluation(self, evaluation: Evaluation, conf_loss: str, step: int) -> None:
        """What an evaluation with the loss says of scores and cells: two images and the cells."""
        assert evaluation.cells is not None  # with the loss they are there
        thresholds = {"best F1": evaluation.conf_threshold}
        plot_reliability(
            self.folder / "reliability.png",
            evaluation.reliability,
            ece=evaluation.ece,
            thresholds=thresholds,
        )
        plot_cumulative_loss(self.folder / "cumulative_loss.png", {conf_loss: evaluation.cells})
        for name in ("reliability", "cumulative_loss"):
            with Image.open(self.folder / f"{name}.png") as image:
                pixels = np.asarray(image.convert("RGB"))
            self.tensorboard.add_image(name, pixels, step, dataformats="HWC")
        text = json.dumps(evaluation.cells)
        (self.folder / "conf_cells.json").write_text(text + "\n", encoding="utf-8")

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write an RGB image as NAME.jpg and to TensorBoard."""
        Image.fromarray(image).save(self.folder / f"{name}.jpg", quality=90)
        self.tensorboard.add_image(name, image, step, dataformats="HWC")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.behind.__exit__(*error)
        finally:
            self.tensorboard.close()
            self._lock.unlink(missing_ok=True)


def lock(path: Path) -> None:
    """Write this process's number to a file that no living process has. Raises UserError else."""
    try:
        with open(path, "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        number = path.read_text(encoding="ascii").strip()
        if number.isdigit() and is_running(int(number)):
            raise UserError(
                f"{path.parent} is in use by process {number}. Give another --save_dir, or delete "
                f"{path} if that process is no training."
            ) from None
        path.write_text(str(os.getpid()), encoding="ascii")


def is_running(number: int) -> bool:
    """Whether another process of this number lives on this machine."""
    if number == os.getpid() or os.name == "nt":  # there, os.kill would end the process
        return False
    try:
        os.kill(number, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def read_metrics(path: Path, last_epoch: int) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv up to an epoch; a row cut off by a crash is dropped."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [
        {key: row.get(key, "") for key in COLUMNS}
        for row in rows
        if row["epoch"].isdigit() and int(row["epoch"]) <= last_epoch
    ]


def describe(row: Mapping[str, Any]) -> str:
    """One printed line for an epoch."""
    terms = " ".join(f"{name} {row[name]:.4f}" for name in ("loc", "conf", "cls"))
    line = f"epoch {row['epoch']:3d}  loss {row['loss']:.4f} ({terms})"
    line += f"  lr {row['lr']:.2e}  {row['images_per_second']:.1f} images/s"
    if "val_ap50" in row:
        line += f"  val {row['val_loss']:.4f}  AP50 {row['val_ap50']:.4f}  AP {row['val_ap']:.4f}"
        line += f" (score >= {EVAL_CONF_THRESHOLD}, NMS IoU {EVAL_NMS_IOU})"
        line += f"  best F1 {row['f1']:.3f} at {row['conf_threshold']:.3f}"
    return line


def _format(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int | str) else f"{value:.6g}"


MOST_IMAGES = 8
MIN_SIDE = 320  # of the longer side of one image of a training batch
SHOWN_HW = (416, 416)  # size of one image of detections
MOST_BOXES = 50  # in one image of detections: an early threshold passes hundreds


def batch_image(images: Tensor, targets: Tensor, class_names: Sequence[str]) -> np.ndarray:
    """The first images of a training batch with the boxes that the loss is given.

    images: uint8 (B, 3, H, W); targets: (N, 6). Returns RGB uint8.
    """
    height, width = images.shape[2:]
    zoom = math.ceil(MIN_SIDE / max(height, width))  # labels would cover a smaller image
    size = targets.new_tensor([width, height]).repeat(2) * zoom
    drawn = []
    for index, image in enumerate(images[:MOST_IMAGES]):
        rows = targets[(targets[:, 0] == index) & (targets[:, 4] > 0)]  # without the padding
        boxes_xyxy = (box_convert(rows[:, 2:], "cxcywh", "xyxy") * size).numpy()
        pixels = resize(image.permute(1, 2, 0).numpy(), (height * zoom, width * zoom))
        drawn.append(draw_boxes(pixels, boxes_xyxy, rows[:, 1].int().numpy(), class_names))
    return image_grid(drawn)


def detections_image(
    samples: Sequence[Sample],
    detections: Sequence[np.ndarray],
    class_names: Sequence[str],
    conf_threshold: float,
) -> np.ndarray:
    """Images of a split, evenly chosen, with what is found at a threshold. Returns RGB uint8.

    detections: a (n, 6) array of xyxy, score, class an image, in its own pixels. Of each image
    the MOST_BOXES best are drawn.
    """
    chosen = np.linspace(0, len(samples) - 1, min(MOST_IMAGES, len(samples))).astype(int)
    drawn = []
    for index in chosen:
        rows = torch.from_numpy(detections[index])
        rows = rows[rows[:, 4] >= conf_threshold]
        rows = rows[rows[:, 4].argsort(descending=True, stable=True)[:MOST_BOXES]]
        boxes_xyxy = image_to_letterbox(rows[:, :4], samples[index].image_hw, SHOWN_HW).numpy()
        image = letterbox(read_image(samples[index].image_path), SHOWN_HW)
        class_ids, scores = rows[:, 5].int().numpy(), rows[:, 4].numpy()
        drawn.append(draw_boxes(image, boxes_xyxy, class_ids, class_names, scores))
    return image_grid(drawn)
