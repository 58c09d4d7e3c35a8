"""Plots as image files: training curves, precision and recall, calibration, loss of the cells."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.typing import ColorType

from metrics.calibration import CALIBRATION_FLOOR

TRAIN_COLOUR, VALIDATION_COLOUR = "#1f77b4", "#d95f02"
TERM_COLOURS = {"loc": "#1b9e77", "conf": "#7570b3", "cls": "#e7298a"}
DPI = 120
LOG_FROM = 20  # a curve that spans more than this factor is drawn on a logarithmic axis
MAX_NAMED_CLASSES = 20  # more curves than this cannot be told apart: they are drawn grey
RECALL_GRID = np.linspace(0, 1, 101)
# Share of the cells whose loss the legend reports: negatives are a thousand times as many.
HARDEST = {"positive": 0.1, "negative": 0.01}

Row = Mapping[str, str | float | None]


def plot_losses(path: str | Path, rows: Sequence[Row]) -> None:
    """Plot total loss and its terms over epochs, of training and validation.

    Args:
        rows: The lines of metrics.csv (epoch, loss, loc, conf, cls, val_loss, val_loc, ...). A
            value that is absent, "" or nan was not measured.
    """
    # A Figure of its own, not pyplot: no display, no global list of figures that fills up.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    total, terms = figure.subplots(1, 2)
    _curve(total, rows, "loss", TRAIN_COLOUR, "train")
    _curve(total, rows, "val_loss", VALIDATION_COLOUR, "validation")
    _finish(total, "Total loss", "loss")
    for name, colour in TERM_COLOURS.items():
        _curve(terms, rows, name, colour, f"{name}, train")
        _curve(terms, rows, f"val_{name}", colour, f"{name}, validation", "--")
    _finish(terms, "Its terms, as weighted in the sum", "loss term")
    figure.savefig(path, dpi=DPI)


def plot_map(path: str | Path, rows: Sequence[Row]) -> None:
    """Plot validation AP50 (and COCO AP where measured) over epochs, with the best AP50 marked.

    Args:
        rows: The lines of metrics.csv, with epoch, val_ap50 and val_ap.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    _curve(axes, rows, "val_ap50", VALIDATION_COLOUR, "AP50 (VOC)")
    _curve(axes, rows, "val_ap", TRAIN_COLOUR, "AP .50:.95 (COCO)")
    epochs, values = column(rows, "val_ap50")
    if len(values):
        best = int(values.argmax())
        axes.plot(epochs[best], values[best], "*", color="black", markersize=13, zorder=5)
        axes.axhline(values[best], color="black", linewidth=0.7, linestyle=":")
        title = f"Validation: best AP50 {values[best]:.3f} in epoch {epochs[best]:g}"
    else:
        title = "Validation: AP50 not measured yet"
    _finish(axes, title, "average precision", legend="lower right", logarithmic=False)
    axes.set_ylim(0, 1.02)
    figure.savefig(path, dpi=DPI)


def plot_precision_recall(
    path: str | Path,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    average_precisions: Mapping[str, float],
    *,
    iou: float = 0.5,
) -> None:
    """Plot a precision-recall curve per class, ordered by AP, and the mean of all.

    Precision is drawn as AP counts it: the best at a recall or a higher one.

    Args:
        curves: Class name -> (precision, recall) after each detection, by falling score, for
            classes with ground truth.
        average_precisions: AP of at least these classes.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    ranked = sorted(curves, key=lambda name: -average_precisions[name])
    many = len(ranked) > MAX_NAMED_CLASSES
    colours = distinct_colours(len(ranked))
    for index, name in enumerate(ranked):
        style = {"color": "0.75", "linewidth": 0.7} if many else {"color": colours[index]}
        label = None if many else f"{average_precisions[name]:.3f}  {plain(name)}"
        axes.plot(RECALL_GRID, envelope(*curves[name]), label=label, **style)
    if ranked:
        mean = np.mean([envelope(*curves[name]) for name in ranked], axis=0)
        mean_ap = np.mean([average_precisions[name] for name in ranked])
        label = f"{mean_ap:.3f}  mean of {len(ranked)}"
        axes.plot(RECALL_GRID, mean, color="black", linewidth=2.5, label=label)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="AP", frameon=False)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.set_title(f"Precision and recall at IoU {iou:g}" if ranked else "No object to recall")
    clean(axes)
    figure.savefig(path, dpi=DPI)


def plot_reliability(
    path: str | Path,
    bins: Mapping[str, Sequence[float]],
    *,
    ece: float,
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Plot a reliability diagram: precision against score per bin, and below it the counts.

    Args:
        bins: As `metrics.calibration.reliability` returns them.
        ece: Expected calibration error of the bins.
        thresholds: Label -> score, drawn as lines.
    """
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    names = ("confidence", "precision", "count")
    confidence, precision, count = (np.array(bins[name], dtype=float) for name in names)
    edges = np.arange(len(count)) / len(count)
    bar = {"width": 0.94 / len(count), "align": "edge", "color": TRAIN_COLOUR, "alpha": 0.35}
    axes.bar(edges, precision, **bar)
    axes.plot([0, 1], [0, 1], "--", color="0.4", label="calibrated")
    axes.vlines(confidence, confidence, precision, color=VALIDATION_COLOUR)
    axes.plot(confidence, precision, "o", color=TRAIN_COLOUR, label="at the bin's mean score")
    below.bar(edges, count, **bar)
    for panel in (axes, below):
        _mark_scores(panel, thresholds or {})
        clean(panel)
    counted = f"{int(count.sum())} boxes of score >= {CALIBRATION_FLOOR:g}"
    error = f"Expected calibration error {ece:.3f}, " if count.any() else ""
    axes.set(title=error + counted, ylabel="precision", ylim=(0, 1.02))
    # Outside: the points, the bars and the lines of thresholds may be anywhere inside.
    place = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    figure.legend(*axes.get_legend_handles_labels(), **place)
    below.set(xlabel="score", ylabel="boxes", xlim=(0, 1))
    below.set(yscale="log" if count.any() else "linear", ylim=(0.5, 2 * max(1, count.max())))
    figure.savefig(path, dpi=DPI)


def plot_cumulative_loss(path: str | Path, histograms: Mapping[str, Mapping[str, Any]]) -> None:
    """Plot the share of the confidence loss, cells from easy to hard (Lin et al. 2017, fig. 4).

    Positives and negatives have one curve per label each, normalised to 1. Unlike the paper's, the
    negatives' axis is logarithmic towards its hard end: on a linear axis nearly every curve rises
    within the last hundredth.

    Args:
        histograms: Label -> CellHistogram.to_json().
    """
    figure = Figure(figsize=(11, 4.6 + 0.22 * len(histograms)), layout="constrained")
    positives, negatives = figure.subplots(1, 2)
    grid = np.linspace(0, 1, 1001)
    _cumulative_panel(positives, histograms, "positive", ticks=grid, fractions=grid)
    positives.xaxis.set_major_formatter(PercentFormatter(1))
    most = max((sum(own["negative"]["cells"]) for own in histograms.values()), default=0)
    nines = np.linspace(0, math.log10(max(most, 10)), 1001)  # 2 is 99%; the end is one cell
    _cumulative_panel(negatives, histograms, "negative", ticks=nines, fractions=1 - 10**-nines)
    whole = range(int(nines[-1]) + 1)
    negatives.set_xticks(whole, [f"{100 - 10.0 ** (2 - n):.{max(n - 2, 0)}f}%" for n in whole])
    figure.savefig(path, dpi=DPI, bbox_inches="tight")  # a long label makes it wider


def column(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the rows in which `key` was measured."""
    points = [(number(row["epoch"]), number(row.get(key))) for row in rows]
    measured = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    epochs, values = np.array(measured, dtype=float).reshape(-1, 2).T
    return epochs, values


def envelope(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Best precision at each recall of RECALL_GRID or a higher one; 0 beyond the last recall."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return np.append(best, 0.0)[np.searchsorted(recall, RECALL_GRID)]


def cumulative_share(
    cells: Sequence[float], loss: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Cumulative shares of cells and of their loss.

    Args:
        cells, loss: Number of cells and their loss per bin, from easy to hard.

    Returns:
        (bins + 1,) each, from 0 to 1; None without loss.
    """
    fractions, shares = (np.cumsum([0, *column]) for column in (cells, loss))
    if not (fractions[-1] > 0 and 0 < shares[-1] < math.inf):
        return None
    return fractions / fractions[-1], shares / shares[-1]


def _cumulative_panel(
    axes: Axes,
    histograms: Mapping[str, Mapping[str, Any]],
    group: str,
    *,
    ticks: np.ndarray,
    fractions: np.ndarray,
) -> None:
    """Draw a curve per label. ticks: positions on the axis of the `fractions` of the cells."""
    axes.plot(ticks, fractions, ":", color="0.5", label="if every cell had the same loss")
    hardest = HARDEST[group]
    colours = distinct_colours(len(histograms))
    found = False
    for index, (label, histogram) in enumerate(histograms.items()):
        curve = cumulative_share(histogram[group]["cells"], histogram[group]["loss"])
        colour = colours[index % len(colours)]
        if curve is None:
            axes.plot([], [], label=f"none  {plain(label)}", color=colour)
            continue
        found = True
        share = 1 - np.interp(1 - hardest, *curve)
        told = f"{share:4.0%}  {plain(label)}"
        axes.plot(ticks, np.interp(fractions, *curve), label=told, color=colour)
    if not found:
        axes.text(0.5, 0.1, f"no {group}s with a loss", ha="center", transform=axes.transAxes)
    title = f"share of the loss in the hardest {hardest:.0%}"
    place = {"bbox_to_anchor": (0, -0.13), "alignment": "left"}  # below: curves may be anywhere
    axes.legend(title=title, frameon=False, loc="upper left", **place)
    axes.set(title=f"{group.capitalize()}s", ylim=(0, 1.02), xlim=(0, ticks[-1]))
    axes.set(xlabel=f"{group}s, from easy to hard", ylabel="share of their loss up to there")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    clean(axes)


def _mark_scores(axes: Axes, thresholds: Mapping[str, float]) -> None:
    """Lines at thresholds; grey where scores are too low to count."""
    axes.axvspan(0, CALIBRATION_FLOOR, color="0.93")
    for index, (label, score) in enumerate(thresholds.items()):
        line = ("-", "--", ":")[index % 3]
        label = f"{score:.3f}  {plain(label)}"
        axes.axvline(score, color="black", linestyle=line, linewidth=1, label=label)


def distinct_colours(count: int) -> list[ColorType]:
    """Matplotlib's ten colours, or its twenty where ten are not enough."""
    return color_sequences["tab10" if count <= 10 else "tab20"]


def plain(text: str) -> str:
    """Escape a label for Matplotlib: "$" would start math, a leading "_" hide the label."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def number(value: str | float | None) -> float:
    """A float; nan for None and for the empty field of a table."""
    return math.nan if value is None or value == "" else float(value)


def _curve(
    axes: Axes, rows: Sequence[Row], key: str, colour: str, label: str, line: str = "-"
) -> None:
    """Draw the measured values; few points are marked, since a single one would be invisible."""
    epochs, values = column(rows, key)
    if len(values):
        marker = "o" if len(values) <= 30 else None
        axes.plot(epochs, values, line, color=colour, label=label, marker=marker, markersize=4)


def _finish(
    axes: Axes,
    title: str,
    ylabel: str,
    *,
    legend: Literal["best", "lower right"] = "best",
    logarithmic: bool = True,
) -> None:
    """Set title, labels, legend, scale and whole epochs."""
    lines = axes.get_lines()
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    if lines:
        axes.legend(loc=legend, frameon=False)
        values = np.concatenate([line.get_ydata() for line in lines])
        if logarithmic and values.min() > 0 and values.max() > LOG_FROM * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", transform=axes.transAxes)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    clean(axes)


def clean(axes: Axes) -> None:
    """A light grid, without the top and right edge of the frame."""
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
