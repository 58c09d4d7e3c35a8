import math

import numpy as np
import pytest

from metrics.calibration import (
    CALIBRATION_BINS,
    CALIBRATION_FLOOR,
    DEFAULT_THRESHOLD,
    best_f1_threshold,
    expected_calibration_error,
    is_measured,
    operating_point,
    reliability,
)


def plain_f1(scores, hits, objects, threshold):
    kept = [hit for score, hit in zip(scores, hits, strict=True) if score >= threshold]
    return 2 * sum(kept) / (len(kept) + objects)


@pytest.mark.parametrize(("scores", "hits", "objects"), [([], [], 0), ([], [], 5), ([0.9], [0], 5)])
def test_without_a_true_positive_the_default_stands_in(scores, hits, objects):
    assert best_f1_threshold(scores, hits, objects) == (DEFAULT_THRESHOLD, 0, 0, 0)


@pytest.mark.parametrize("seed", range(10))
def test_no_threshold_does_better(seed):
    rng = np.random.default_rng(seed)
    hits = rng.random(200) < 0.4
    scores = (rng.integers(0, 40, 200) / 40 + hits).astype(np.float32)  # many equal scores
    best = best_f1_threshold(scores, hits, 120)
    tried = [plain_f1(scores, hits, 120, threshold) for threshold in np.unique(scores)]
    assert best.f1 == pytest.approx(max(tried))
    kept = scores >= best.conf_threshold
    assert best.f1 == pytest.approx(plain_f1(scores, hits, 120, best.conf_threshold))
    assert best.precision == pytest.approx(hits[kept].mean())
    assert best.recall == pytest.approx(hits[kept].sum() / 120)


@pytest.mark.parametrize(
    ("metrics", "measured"),
    [({}, False), ({"best_AP50": -1.0}, False), ({"f1": 0.0}, False), ({"f1": 0.01}, True)],
)
def test_a_threshold_is_measured_once_an_object_was_found(metrics, measured):
    assert is_measured(metrics) is measured


def test_order_does_not_matter():
    scores, hits = np.array([0.9, 0.7, 0.7, 0.7, 0.2]), np.array([1, 0, 1, 0, 1])
    results = {best_f1_threshold(scores[p], hits[p], 3) for p in ([0, 1, 2, 3, 4], [4, 2, 3, 1, 0])}
    assert len(results) == 1


def test_equal_scores_are_kept_or_dropped_together():
    best = best_f1_threshold([0.8, 0.8, 0.1], [True, False, False], 1)
    assert best == (0.8, pytest.approx(2 / 3), 0.5, 1.0)


def test_the_highest_of_equally_good_thresholds_wins():
    # F1 is 2 / 3 at .9 (1 of 1 box, 1 of 2 objects) and at .3 (2 of 4 boxes, 2 of 2 objects).
    assert best_f1_threshold([0.9, 0.5, 0.4, 0.3], [1, 0, 0, 1], 2).conf_threshold == 0.9


def test_a_float32_score_at_the_threshold_passes_it():
    scores = np.array([0.1, 0.7], np.float32)
    threshold = best_f1_threshold(scores, [True, True], 2).conf_threshold
    assert (scores >= threshold).all()


@pytest.mark.parametrize("judge", [best_f1_threshold, reliability])
def test_lengths_that_disagree_are_an_error(judge):
    with pytest.raises(ValueError, match="2 scores"):
        judge([0.1, 0.2], [True], *([1] if judge is best_f1_threshold else []))


@pytest.mark.parametrize("seed", range(3))
def test_at_its_own_threshold_the_best_point_comes_back(seed):
    rng = np.random.default_rng(seed)
    scores, hits = rng.random(60).round(1), rng.random(60) < 0.5
    best = best_f1_threshold(scores, hits, 45)
    assert operating_point(scores, hits, 45, conf_threshold=best.conf_threshold) == best


def test_an_operating_point_by_hand():
    point = operating_point([0.9, 0.5, 0.5, 0.2], [1, 0, 1, 1], 4, conf_threshold=0.5)
    assert point == pytest.approx((0.5, 4 / 7, 2 / 3, 2 / 4))


@pytest.mark.parametrize(
    ("scores", "hits", "objects"), [([], [], 0), ([], [], 3), ([0.4], [1], 1), ([0.9], [0], 0)]
)
def test_without_a_true_positive_above_the_threshold_all_is_zero(scores, hits, objects):
    assert operating_point(scores, hits, objects, conf_threshold=0.5) == (0.5, 0, 0, 0)


def plain_calibration_error(scores, hits, bins, floor):
    """Guo et al. 2017, equation 3, box by box."""
    members = [[] for _ in range(bins)]
    for score, hit in zip(scores, hits, strict=True):
        if score >= floor:
            members[min(int(score * bins), bins - 1)].append((score, hit))
    total, error = sum(map(len, members)), 0.0
    for part in filter(None, members):
        precision = sum(hit for _, hit in part) / len(part)
        confidence = sum(score for score, _ in part) / len(part)
        error += len(part) / total * abs(precision - confidence)
    return error


@pytest.mark.parametrize("seed", range(5))
def test_the_calibration_error_equals_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random(300) ** 3
    scores[:8] = 0, 1, 0.1, 0.3, 0.7, 0.9, CALIBRATION_FLOOR, CALIBRATION_FLOOR - 1e-9
    hits = rng.random(300) < scores**2
    expected = plain_calibration_error(
        scores.tolist(), hits.tolist(), CALIBRATION_BINS, CALIBRATION_FLOOR
    )
    assert expected > 0.05
    assert expected_calibration_error(reliability(scores, hits)) == pytest.approx(expected)


def test_bins_hold_mean_score_precision_and_count():
    bins = reliability([0.04, 0.06, 0.41, 0.43, 0.43, 1.0], [1, 0, 1, 0, 1, 1])
    assert bins["count"] == [1, 0, 0, 0, 3, 0, 0, 0, 0, 1]
    assert [bins["confidence"][i] for i in (0, 4, 9)] == pytest.approx([0.06, 1.27 / 3, 1])
    assert [bins["precision"][i] for i in (0, 4, 9)] == pytest.approx([0, 2 / 3, 1])
    assert all(math.isnan(bins[key][5]) for key in ("confidence", "precision"))


def test_scores_that_tell_the_truth_have_no_calibration_error():
    scores = np.repeat([0.25, 0.75], 400)
    hits = np.tile([True, False, False, False], 200)
    hits[400:] = ~hits[400:]
    assert expected_calibration_error(reliability(scores, hits)) == 0


@pytest.mark.parametrize("scores", [[], [CALIBRATION_FLOOR / 2]])
def test_without_a_score_above_the_floor_calibration_is_undefined(scores):
    assert math.isnan(expected_calibration_error(reliability(scores, [True] * len(scores))))
