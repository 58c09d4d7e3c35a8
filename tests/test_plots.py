import csv
import io

import cv2
import numpy as np
import pytest

from utils.plots import column, envelope, plot_losses, plot_map, plot_precision_recall

CSV = """epoch,step,lr,loss,loc,conf,cls,val_loss,val_ap50
1,10,0.1,9.0,4.0,4.0,1.0,,
2,20,0.1,3.0,1.0,1.5,0.5,4.0,0.25
3,30,0.1,nan,nan,nan,nan,,
4,40,0.1,0.3,0.1,0.1,0.1,0.5,0.75
"""


def rows():
    return list(csv.DictReader(io.StringIO(CSV)))


def inked_share(path):
    """How much of a picture is not white; fails when it is no picture."""
    image = cv2.imread(str(path))
    assert min(image.shape[:2]) >= 400
    return (image < 250).any(axis=2).mean()


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
