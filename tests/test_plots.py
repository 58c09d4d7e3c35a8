import csv
import io

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from losses.conf.cells import CellHistogram, ConfCells
from metrics.calibration import reliability
from metrics.plots import (
    column,
    cumulative_share,
    envelope,
    plot_cumulative_loss,
    plot_losses,
    plot_map,
    plot_precision_recall,
    plot_reliability,
)

CSV = """epoch,step,lr,loss,loc,conf,cls,val_loss,val_ap50
1,10,0.1,9.0,4.0,4.0,1.0,,
2,20,0.1,3.0,1.0,1.5,0.5,4.0,0.25
3,30,0.1,nan,nan,nan,nan,,
4,40,0.1,0.3,0.1,0.1,0.1,0.5,0.75
"""


def rows():
    return list(csv.DictReader(io.StringIO(CSV)))


def inked_share(path, below=250):
    """How much of an image is not white; fails when it is no image."""
    image = cv2.imread(str(path))
    assert min(image.shape[:2]) >= 400
    return (image.min(axis=2) < below).mean()


def test_a_column_holds_only_what_was_measured():
    epochs, values = column(rows(), "loss")
    assert epochs.tolist() == [1, 2, 4]
    assert values.tolist() == [9.0, 3.0, 0.3]
    assert column(rows(), "val_ap50")[1].tolist() == [0.25, 0.75]
    assert [len(part) for part in column(rows(), "absent")] == [0, 0]
    assert [len(part) for part in column([], "loss")] == [0, 0]


def test_a_column_takes_numbers_as_well_as_text():
    epochs, values = column([{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": None}], "loss")
    assert epochs.tolist() == [1]
    assert values.tolist() == [2.5]


@pytest.mark.parametrize("plot", [plot_losses, plot_map])
def test_more_rows_draw_more(plot, tmp_path):
    shares = []
    for count in (0, 4):
        plot(tmp_path / "curve.png", rows()[:count])
        shares.append(inked_share(tmp_path / "curve.png"))
    assert 0 < shares[0] < shares[1]


@pytest.mark.parametrize("plot", [plot_losses, plot_map])
def test_one_row_is_enough(plot, tmp_path):
    plot(tmp_path / "curve.png", rows()[1:2])
    assert inked_share(tmp_path / "curve.png") > 0


def test_the_envelope_is_the_best_precision_from_a_recall_on():
    drawn = envelope(np.array([1, 0.5, 0.8]), np.array([0.25, 0.25, 0.5]))
    assert len(drawn) == 101
    assert (drawn[:26] == 1).all()
    assert (drawn[26:51] == 0.8).all()
    assert (drawn[51:] == 0).all()
    assert (envelope(np.zeros(0), np.zeros(0)) == 0).all()


@pytest.mark.parametrize("classes", [0, 1, 3, 25])
def test_precision_recall_is_drawn_for_any_number_of_classes(classes, tmp_path, recwarn):
    names = ["_private", r"no $\maths$", "плот", *(f"class {i}" for i in range(22))][:classes]
    curve = np.array([1, 0.5, 2 / 3]), np.array([0.5, 0.5, 1.0])
    path = tmp_path / "precision_recall.png"
    plot_precision_recall(path, dict.fromkeys(names, curve), dict.fromkeys(names, 0.8))
    assert inked_share(path) > 0
    assert not recwarn.list


@pytest.mark.parametrize("count", [0, 1, 500])
def test_reliability_is_drawn_for_any_number_of_boxes(count, tmp_path, recwarn):
    scores = np.linspace(0.06, 1, count)
    bins = reliability(scores, scores > 0.5)
    path = tmp_path / "reliability.png"
    plot_reliability(path, bins, ece=0.1, thresholds={"_$best F1$": 0.4, "other": 0.5})
    with_lines = inked_share(path, below=50)  # of black
    plot_reliability(path, bins, ece=0.1)
    assert 0 < inked_share(path, below=50) < with_lines
    assert not recwarn.list


@pytest.mark.parametrize("score", [0.0, 0.1, 0.5, 1.0])
def test_the_legend_of_reliability_lies_over_nothing(score, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    bins = reliability(np.linspace(0.06, 1, 50), np.linspace(0, 1, 50) > 0.5)
    thresholds = {"best F1 here": score, "the checkpoint's, chosen elsewhere": 0.7}
    plot_reliability(tmp_path / "reliability.png", bins, ece=0.1, thresholds=thresholds)
    (figure,) = drawn
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert {text.get_text() for text in legend.get_texts()} > {f"{score:.3f}  best F1 here"}


def cell_histogram(positives, negatives, gamma=0.0):
    """Of logits drawn as a trained network has them, with a loss of BCE difficulty^gamma."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(1, positives + negatives, generator=rng) * 2 - 5
    logits[:, :positives] += 6
    targets = torch.zeros_like(logits)
    targets[:, :positives] = 1
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    losses = bce * (targets - logits.sigmoid()).abs() ** gamma
    histogram = CellHistogram()
    counted = torch.ones_like(targets, dtype=torch.bool)
    histogram.add(ConfCells(logits, targets, targets > 0, counted, losses, [logits.numel()]))
    return histogram.to_json(), losses[0, :positives], losses[0, positives:]


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_cumulative_share_equals_that_of_the_sorted_cells(gamma):
    histogram, *losses = cell_histogram(400, 20000, gamma)
    for group, exact in zip(("positive", "negative"), losses, strict=True):
        fractions, shares = cumulative_share(histogram[group]["cells"], histogram[group]["loss"])
        running = exact.double().sort().values.cumsum(0) / exact.double().sum()
        grid = np.arange(1, len(exact) + 1) / len(exact)
        assert (fractions[0], shares[0], fractions[-1], shares[-1]) == (0, 0, 1, 1)
        assert abs(np.interp(grid, fractions, shares) - running.numpy()).max() < 0.01


@pytest.mark.parametrize(
    ("cells", "loss"), [([], []), ([0, 0], [0, 0]), ([3, 1], [0, 0]), ([3, 1], [1, np.nan])]
)
def test_without_a_loss_there_is_no_cumulative_share(cells, loss):
    assert cumulative_share(cells, loss) is None


@pytest.mark.parametrize(("positives", "negatives"), [(0, 0), (0, 900), (1, 0), (50, 9000)])
def test_cumulative_losses_are_drawn_for_any_number_of_cells(
    positives, negatives, tmp_path, recwarn
):
    histograms = {
        f"_focal $gamma$ {gamma}": cell_histogram(positives, negatives, gamma)[0]
        for gamma in (0.0, 2.0)
    }
    path = tmp_path / "cumulative_loss.png"
    plot_cumulative_loss(path, {})
    nothing = inked_share(path)
    plot_cumulative_loss(path, histograms)
    assert 0 < nothing < inked_share(path)
    assert not recwarn.list
