import math

import numpy as np
import pytest

from metrics.coco import coco_average_precision
from tests.coco_reference import pycocotools_figures
from tests.test_average_precision import BOX, FAR, random_split


@pytest.mark.parametrize("per_image", [3, 40, 150])
@pytest.mark.parametrize("seed", range(5))
def test_coco_figures_agree_with_pycocotools(seed, per_image):
    detections, truth = random_split(seed, per_image=per_image)
    figures = coco_average_precision(detections, truth, 4)  # class 3 has no object
    assert figures == pytest.approx(pycocotools_figures(detections, truth, 4), abs=1e-12)
    assert figures.AP > 0


def test_equal_scores_and_equal_overlaps_are_ordered_as_by_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, detections = [], []
        for _ in range(4):
            boxes = rng.integers(0, 4, (6, 4)).astype(np.float32) * 5
            boxes[:, 2:] = boxes[:, :2] + 10 + boxes[:, 2:]
            truth.append((rng.integers(0, 2, 6), boxes, rng.random(6) < 0.3))
            copies = boxes[rng.integers(0, 6, 12)] + rng.integers(-1, 2, (12, 4)) * 2.5
            scores = rng.integers(1, 4, 12) / 4
            classes = rng.integers(0, 2, 12)
            detections.append(np.column_stack((copies, scores, classes)).astype(np.float32))
        figures = coco_average_precision(detections, truth, 2)
        assert figures == pytest.approx(pycocotools_figures(detections, truth, 2), abs=1e-12)


def test_coco_figures_of_perfect_boxes_are_one_and_of_none_zero():
    _, truth = random_split(1)
    perfect = [
        np.column_stack((boxes, np.ones(len(ids)), ids)).astype(np.float32)
        for ids, boxes, _ in truth
    ]
    assert coco_average_precision(perfect, truth, 3) == pytest.approx((1, 1, 1))
    assert coco_average_precision([part[:0] for part in perfect], truth, 3) == (0, 0, 0)


def test_coco_figures_leave_boxes_on_a_difficult_object_out():
    truth = [(np.array([0, 0]), np.array([BOX, FAR], np.float32), np.array([True, False]))]
    rows = [[*BOX, 0.9, 0], [*BOX, 0.8, 0], [*FAR, 0.7, 0]]
    assert coco_average_precision([np.array(rows, np.float32)], truth, 1) == pytest.approx(
        (1, 1, 1)
    )


def test_coco_figures_without_an_object_that_counts_are_nan():
    boxes, one = np.array([BOX], np.float32), np.array([0])
    nothing = (one[:0], boxes[:0], np.zeros(0, bool))
    difficult = (one, boxes, np.ones(1, bool))
    row = np.array([[*BOX, 0.9, 0]], np.float32)
    for truth in ([], [nothing], [difficult]):
        assert all(map(math.isnan, coco_average_precision([row] * len(truth), truth, 1)))
