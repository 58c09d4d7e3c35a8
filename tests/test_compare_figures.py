import math
from pathlib import Path

import numpy as np
import pytest

from data.image import read_image
from data.voc import scan_split
from engine.predictor import Predictor
from lab.plan import Run
from lab.plots import (
    GROUPS,
    IMAGE_SIDE,
    MOST_BOXES,
    add_cells,
    choose_images,
    draw_detected,
    draw_truth,
    gradient_shares,
    over_seeds,
    plot_cells,
    plot_learning_curves,
    plot_shares,
    small,
)
from lab.results import Result
from tests.factory import add_image, write_split
from tests.test_compare_report import CLASSES, checkpoint
from utils.draw import draw_boxes
from weights.checkpoint import save_checkpoint


def result(rows=(), *, folder="unused", finished=True, cells=None):
    return Result(
        run=Run("bce", 0, folder),
        finished=finished,
        failure="",
        figures={},
        rows=rows,
        cells=cells,
        settings=None,
    )


def row(epoch, **values):
    return {"epoch": str(epoch), **{name: str(value) for name, value in values.items()}}


def test_curves_of_seeds_meet_on_the_epochs_that_any_has_measured():
    first = result([row(1, val_ap50=0.1), row(2, val_ap50=""), row(4, val_ap50=0.3)])
    second = result([row(1, val_ap50=0.2), row(3, val_ap50=0.5)])
    epochs, values = over_seeds([first, result(), second], "val_ap50")
    assert epochs.tolist() == [1, 3, 4]
    nan = math.nan
    np.testing.assert_array_equal(values, [[0.1, nan, 0.3], [0.2, 0.5, nan]])


def test_without_a_measurement_there_is_no_curve():
    assert over_seeds([], "val_ap50") is None
    assert over_seeds([result(), result([row(1, val_ap50="")])], "val_ap50") is None
    assert gradient_shares([result([row(1, val_ap50=0.1)])]) is None


def shares(epoch, *values):
    return row(epoch, **{f"conf_grad_{group}": v for group, v in zip(GROUPS, values, strict=True)})


def test_gradient_shares_are_means_over_the_seeds_in_the_order_of_the_groups():
    own = [result([shares(1, 0.2, 0.3, 0.5), shares(2, 1, 0, 0)]), result([shares(1, 0.4, 0.6, 0)])]
    epochs, (positive, hard, easy) = gradient_shares(own)
    assert list(GROUPS) == ["positive", "hard", "easy"]
    assert epochs.tolist() == [1, 2]
    assert positive == pytest.approx([0.3, 1])
    assert hard == pytest.approx([0.45, 0])
    assert easy == pytest.approx([0.25, 0])


def histogram(cells, loss):
    groups = {"positive": {"cells": cells, "loss": loss}}
    groups["negative"] = {"cells": cells[::-1], "loss": loss[::-1]}
    return {"difficulty": [0.1, 0.9], **groups}


def test_cells_of_the_seeds_are_added_bin_by_bin():
    found = add_cells([histogram([10, 2], [0.5, 4.0]), histogram([1, 3], [0.25, 1.0])])
    assert found == histogram([11, 5], [0.75, 5.0])
    assert add_cells([histogram([10, 2], [0.5, 4.0])]) == histogram([10, 2], [0.5, 4.0])


def test_only_cells_of_finished_runs_are_drawn(tmp_path):
    unripe = result(finished=False, cells=histogram([1, 1], [1.0, 1.0]))
    assert not plot_cells(tmp_path / "cells.png", {"bce": [unripe, result()]})
    assert not (tmp_path / "cells.png").exists()
    assert plot_cells(
        tmp_path / "cells.png", {"bce": [result(cells=histogram([1, 1], [1.0, 1.0]))]}
    )


def test_a_loss_without_any_run_leaves_the_plots_of_the_others(tmp_path, recwarn):
    rows = [row(1, val_ap50=0.1, conf_grad_positive=1, conf_grad_hard=0, conf_grad_easy=0)]
    grouped = {"bce": [], "focal": [result(rows), result()]}
    for plot in (plot_learning_curves, plot_shares):
        assert plot(tmp_path / "plot.png", grouped)
        assert not plot(tmp_path / "none.png", {"bce": [result()], "focal": []})
    assert not (tmp_path / "none.png").exists()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])]
)
def test_images_are_chosen_evenly_over_the_split(count, chosen):
    assert choose_images(range(count)) == chosen


@pytest.mark.parametrize(("height", "width"), [(1, 1), (IMAGE_SIDE, 10), (1000, 500), (1, 5000)])
def test_a_large_image_is_made_small_and_a_small_one_left(height, width):
    image, factor = small(np.zeros((height, width, 3), np.uint8))
    assert max(image.shape[:2]) == min(IMAGE_SIDE, max(height, width))
    assert min(image.shape[:2]) >= 1
    assert factor == min(1, IMAGE_SIDE / max(height, width))


@pytest.fixture
def detected(tmp_path):
    """Detects in one image with the threshold that its checkpoint stores."""
    add_image(tmp_path, "1", np.full((320, 320, 3), 99, np.uint8), [(CLASSES[0], (9, 9, 50, 50))])
    write_split(tmp_path, "test", ["1"])
    samples, _ = scan_split(f"{tmp_path}:test", CLASSES)

    def detect(conf_threshold):
        (tmp_path / "run").mkdir(exist_ok=True)
        stored = {**checkpoint(), "conf_threshold": conf_threshold}
        save_checkpoint(tmp_path / "run" / "best.pt", stored)
        return draw_detected(result(folder=tmp_path / "run"), samples), samples

    return detect


def test_detections_are_drawn_at_the_threshold_of_the_checkpoint(detected):
    (images, which), samples = detected(0.875)  # an untrained network is not so sure
    assert which == "score ≥ 0.875"
    assert len(images) == 1
    assert (images[0] == 99).all()
    assert not (draw_truth(samples, CLASSES)[0] == 99).all()


def test_of_hundreds_of_boxes_the_best_are_drawn_and_that_is_said(detected):
    (images, which), samples = detected(0.0001)
    path = samples[0].image_path
    found = Predictor(Path(path).parents[1] / "run" / "best.pt", device="cpu")(path)
    assert len(found.scores) > 2 * MOST_BOXES
    best = sorted(range(len(found.scores)), key=lambda place: -found.scores[place])[:MOST_BOXES]
    boxes, ids = found.boxes_xyxy[best], found.class_ids[best]
    image = read_image(path)
    expected = draw_boxes(image, boxes, ids, CLASSES, scores=found.scores[best])
    np.testing.assert_array_equal(images[0], expected)
    assert which == (
        f"score ≥ 0.0001; of up to {len(found.scores)} boxes in an image only the best "
        f"{MOST_BOXES} are drawn"
    )
