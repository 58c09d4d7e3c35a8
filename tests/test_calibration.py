import numpy as np
import pytest

from utils.calibration import DEFAULT_THRESHOLD, best_f1_threshold


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


def test_lengths_that_disagree_are_an_error():
    with pytest.raises(ValueError, match="2 scores"):
        best_f1_threshold([0.1, 0.2], [True], 1)
