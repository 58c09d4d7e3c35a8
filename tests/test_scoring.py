import json
import math

import numpy as np
import pytest

from data.voc import Sample
from metrics.calibration import best_f1_threshold, expected_calibration_error, reliability
from metrics.scoring import format_table, score_detections

NAMES = ("cat", "dog", "cow", "owl")
PLACES = np.array([[x, 0, x + 20, 20] for x in range(0, 600, 30)], np.float32)  # do not overlap


def make_sample(class_ids, difficult=()):
    """An image whose i-th object lies at the i-th place."""
    ids = np.array(class_ids, dtype=np.int64)
    hard = np.isin(np.arange(len(ids)), difficult)
    return Sample("a.png", "a", (20, 600), ids, PLACES[: len(ids)], hard)


def rows(*boxes):
    """Detections of (place, score, class id)."""
    found = [[*PLACES[place], score, class_id] for place, score, class_id in boxes]
    return np.array(found, np.float32).reshape(-1, 6)


@pytest.fixture(scope="module")
def evaluation():
    """Two cats, found at .9 and .4; two dogs, one found at .2; a cow, missed; no owl.

    Beside them a false cat at .3, a false cow at .6, and an ignored cat at .95.
    """
    sample = make_sample([0, 0, 1, 1, 2, 0], difficult=[5])
    cats = [(0, 0.9, 0), (1, 0.4, 0), (10, 0.3, 0), (5, 0.95, 0)]
    found = rows(*cats, (2, 0.2, 1), (11, 0.6, 2))
    return score_detections([sample], [found], NAMES)


def test_each_class_has_its_threshold_of_best_f1(evaluation):
    assert evaluation.class_thresholds["cat"] == pytest.approx(0.4)
    assert evaluation.class_thresholds["dog"] == pytest.approx(0.2)
    assert evaluation.class_f1["cat"] == 1
    assert evaluation.class_f1["dog"] == pytest.approx(2 / 3)


def test_a_class_without_true_positives_takes_the_overall_threshold(evaluation):
    scores, hits = [0.9, 0.4, 0.3, 0.2, 0.6], [1, 1, 0, 1, 0]
    best = best_f1_threshold(np.float32(scores), hits, 5)
    assert evaluation.conf_threshold == best.conf_threshold
    assert evaluation.class_thresholds["cow"] == best.conf_threshold
    assert evaluation.class_thresholds["owl"] == best.conf_threshold
    assert evaluation.class_f1["cow"] == 0
    assert math.isnan(evaluation.class_f1["owl"])


def test_calibration_is_that_of_all_classes_without_ignored_boxes(evaluation):
    scores, hits = np.float32([0.9, 0.4, 0.3, 0.2, 0.6]), [1, 1, 0, 1, 0]
    expected = reliability(scores, hits)
    assert sum(evaluation.reliability["count"]) == 5
    np.testing.assert_allclose(evaluation.reliability["precision"], expected["precision"])
    assert evaluation.ece == pytest.approx(expected_calibration_error(expected))


def test_any_threshold_can_be_judged_afterwards(evaluation):
    assert evaluation.at_threshold(evaluation.conf_threshold).f1 == evaluation.f1
    assert evaluation.at_threshold(0.35) == pytest.approx((0.35, 2 * 2 / (3 + 5), 2 / 3, 2 / 5))
    assert evaluation.at_threshold(1.0) == (1, 0, 0, 0)


@pytest.mark.parametrize("found", [rows(), rows((3, 0.7, 0))])
def test_without_a_true_box_every_threshold_is_the_default(found):
    evaluation = score_detections([make_sample([0])], [found], NAMES)
    assert evaluation.class_thresholds == dict.fromkeys(NAMES, 0.5)
    assert evaluation.class_f1["cat"] == 0
    assert math.isnan(evaluation.ece) == (len(found) == 0)


def test_the_json_is_plain_and_holds_no_nan(evaluation):
    values = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert values["class_f1"]["owl"] is None
    assert values["class_thresholds"].keys() == set(NAMES)
    assert values["reliability"].keys() == {"confidence", "precision", "count"}
    assert values["reliability"]["precision"][1] is None
    assert values["ece"] == pytest.approx(evaluation.ece)
    assert not {"curves", "detections", "matches", "cells"} & values.keys()


def test_the_table_shows_each_class_with_its_threshold_and_the_calibration_error(evaluation):
    table = format_table(evaluation)
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert lines["cat"].split()[-2:] == ["1.0000", "0.4000"]
    assert lines["dog"].split()[-2:] == ["0.6667", "0.2000"]
    assert lines["owl"].split()[-2] == "nan"
    assert f"calibration error {evaluation.ece:.4f} over 5 boxes" in table
