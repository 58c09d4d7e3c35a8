"""The images of a comparison: curves over epochs, and what each loss detects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data.image import read_image
from data.voc import Sample
from engine.predictor import Predictor
from lab.plan import read_json
from lab.results import Result
from losses.conf.cells import HARD_OBJECTNESS
from metrics.plots import clean, column, distinct_colours, plain, plot_cumulative_loss
from utils.draw import draw_boxes

DPI = 110
IMAGES = 4
IMAGE_SIDE = 320  # pixels, of the longer side of a detected image
MOST_BOXES = 50  # drawn per image: an early detector finds hundreds, which would hide it
GROUPS = {"positive": "#1b7837", "hard": "#d95f02", "easy": "#bdbdbd"}


def plot_learning_curves(path: Path, results: Mapping[str, Sequence[Result]]) -> bool:
    """Plot validation AP50 over epochs: the mean over the seeds, and a band from lowest to highest.

    Args:
        results: Loss -> its runs.

    Returns:
        False if there is no data.
    """
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = distinct_colours(len(results))
    for index, (loss, own) in enumerate(results.items()):
        curve = over_seeds(own, "val_ap50")
        if curve is None:
            continue
        epochs, values = curve
        colour = colours[index % len(colours)]
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.plot(epochs, np.nanmean(values, axis=0), label=plain(loss), marker=".", color=colour)
        axes.fill_between(epochs, low, high, alpha=0.15, linewidth=0, color=colour)
    if not axes.get_lines():
        return False
    axes.set(xlabel="epoch", ylabel="AP50 on the validation split", ylim=(0, None))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    finish(axes)
    figure.savefig(path, dpi=DPI)
    return True


def plot_shares(path: Path, results: Mapping[str, Sequence[Result]]) -> bool:
    """Plot gradient shares of cell groups over epochs, seed means, by loss. False: no data."""
    measured = {loss: gradient_shares(own) for loss, own in results.items()}
    found = {loss: shares for loss, shares in measured.items() if shares is not None}
    if not found:
        return False
    last = max(2, *(epochs.max() for epochs, _ in found.values()))  # one axis for all panels
    across = min(3, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(3.2 * across + 0.6, 2.5 * down + 1), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (loss, (epochs, shares)) in zip(panels, found.items(), strict=False):
        bands = axes.stackplot(epochs, shares, colors=GROUPS.values())
        axes.set_title(plain(loss), fontsize=10)
        axes.set(xlim=(1, last), ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        finish(axes)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    names = ("positives", f"hard negatives (objectness > {HARD_OBJECTNESS})", "easy negatives")
    figure.legend(bands, names, loc="outside lower center", ncols=across, frameon=False)
    figure.savefig(path, dpi=DPI)
    return True


def plot_cells(path: Path, results: Mapping[str, Sequence[Result]]) -> bool:
    """Plot the cumulative loss share from easy to hard cells, seeds added up. False: no data."""
    # Finished runs only: the large loss of an early network would dominate the sum.
    ripe = {
        loss: [own.cells for own in runs if own.finished and own.cells is not None]
        for loss, runs in results.items()
    }
    found = {loss: add_cells(histograms) for loss, histograms in ripe.items() if histograms}
    if found:
        plot_cumulative_loss(path, found)
    return bool(found)


def over_seeds(results: Sequence[Result], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Epochs (n,) in which any seed has a value of `key`, and values (seeds, n), nan if missing."""
    curves = [dict(zip(*column(result.rows, key), strict=True)) for result in results]
    epochs = sorted(set().union(*curves))
    if not epochs:
        return None
    values = [[curve.get(epoch, np.nan) for epoch in epochs] for curve in curves if curve]
    return np.array(epochs), np.array(values)


def gradient_shares(results: Sequence[Result]) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """Epochs, and for each of GROUPS its share of |d conf / d logit|, as mean over seeds."""
    found = [over_seeds(results, f"conf_grad_{group}") for group in GROUPS]
    curves = [curve for curve in found if curve is not None]
    if len(curves) < len(GROUPS):
        return None
    return curves[0][0], [np.nanmean(values, axis=0) for _, values in curves]


def add_cells(histograms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum conf_cells.json of one or more runs; their bins are equal."""
    groups = {
        group: {
            kind: np.sum([own[group][kind] for own in histograms], axis=0).tolist()
            for kind in ("cells", "loss")
        }
        for group in ("positive", "negative")
    }
    return {"difficulty": histograms[0]["difficulty"], **groups}


def choose_images(samples: Sequence[Sample]) -> list[Sample]:
    """IMAGES samples, evenly spaced over the split."""
    places = np.linspace(0, len(samples) - 1, min(IMAGES, len(samples))).round().astype(int)
    return [samples[place] for place in places]


def draw_truth(samples: Sequence[Sample], class_names: Sequence[str]) -> list[np.ndarray]:
    """The images, scaled down, with their objects."""
    drawn = []
    for sample in samples:
        image, factor = small(read_image(sample.image_path))
        ids = np.where(sample.difficult, -1, sample.class_ids)
        drawn.append(draw_boxes(image, sample.boxes_xyxy * factor, ids, class_names))
    return drawn


def draw_detected(result: Result, samples: Sequence[Sample]) -> tuple[list[np.ndarray], str]:
    """The images, scaled down, with what the run's best.pt finds, and a text on which boxes."""
    device = (read_json(result.run.folder / "config.json") or {}).get("device") or None
    predictor = Predictor(result.run.folder / "best.pt", device=device)
    images = [read_image(sample.image_path) for sample in samples]
    detections = predictor(images)
    drawn = []
    for image, found in zip(images, detections, strict=True):
        thumbnail, factor = small(image)
        best = np.argsort(-found.scores, kind="stable")[:MOST_BOXES]
        boxes, scores = found.boxes_xyxy[best] * factor, found.scores[best]
        drawn.append(
            draw_boxes(thumbnail, boxes, found.class_ids[best], found.class_names, scores=scores)
        )
    which = f"score ≥ {predictor.conf_threshold:.3g}"
    most = max((len(found.scores) for found in detections), default=0)
    if most > MOST_BOXES:
        which += f"; of up to {most} boxes in an image only the best {MOST_BOXES} are drawn"
    return drawn, which


def small(image: np.ndarray) -> tuple[np.ndarray, float]:
    """An image scaled down to the size in the report, and the scale factor."""
    factor = min(1.0, IMAGE_SIDE / max(image.shape[:2]))
    if factor == 1:
        return image, factor
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), factor


def finish(axes: Axes) -> None:
    """Whole epochs, a light grid, no box around."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    clean(axes)
