"""What a detector's confidences are worth: thresholds of best F1, calibration."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

DEFAULT_THRESHOLD = 0.5  # where no threshold finds anything true
CALIBRATION_BINS = 10  # equally wide in score
# Calibration counts detections from this score on. Evaluation keeps boxes from .001 on, thousands
# of them nearly all false at scores near 0: with them every detector would look calibrated.
CALIBRATION_FLOOR = 0.05


def is_measured(metrics: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's conf_threshold is one of best F1, not DEFAULT_THRESHOLD standing in.

    metrics: the checkpoint's. Before the first evaluation, and while none finds an object, there
    is nothing to choose by.
    """
    return bool(metrics.get("f1"))


class OperatingPoint(NamedTuple):
    """What keeping the detections of scores >= conf_threshold gives; 0 where nothing is kept."""

    conf_threshold: float
    f1: float
    precision: float
    recall: float


def best_f1_threshold(
    scores: ArrayLike, is_true_positive: ArrayLike, num_ground_truth: int
) -> OperatingPoint:
    """The score at which F1 = 2 TP / (detections + ground truth) is highest.

    scores, is_true_positive: (n,), of one class or all together, in any order, without ignored
    detections. The threshold is one of the scores; among equal F1 the highest one, which keeps the
    fewest detections. With no true positive there is nothing to choose by: (0.5, 0, 0, 0).
    Raises ValueError when the lengths disagree.
    """
    values, hits = _arrays(scores, is_true_positive)
    if not hits.any():
        return OperatingPoint(DEFAULT_THRESHOLD, 0.0, 0.0, 0.0)
    order = np.argsort(-values, kind="stable")
    # Equal scores pass a threshold together: only the last of each run can be a cut.
    cuts = np.flatnonzero(np.diff(values[order], append=-np.inf))
    true_positives, kept = np.cumsum(hits[order])[cuts], cuts + 1
    f1 = 2 * true_positives / (kept + num_ground_truth)
    best = int(f1.argmax())
    return OperatingPoint(
        conf_threshold=float(values[order][cuts[best]]),
        f1=float(f1[best]),
        precision=float(true_positives[best] / kept[best]),
        recall=float(true_positives[best] / num_ground_truth),
    )


def operating_point(
    scores: ArrayLike,
    is_true_positive: ArrayLike,
    num_ground_truth: int,
    *,
    conf_threshold: float,
) -> OperatingPoint:
    """F1, precision and recall at a given threshold; otherwise as `best_f1_threshold`."""
    values, hits = _arrays(scores, is_true_positive)
    kept = values >= conf_threshold
    true_positives = int((hits & kept).sum())
    if true_positives == 0:
        return OperatingPoint(conf_threshold, 0.0, 0.0, 0.0)
    return OperatingPoint(
        conf_threshold=conf_threshold,
        f1=float(2 * true_positives / (kept.sum() + num_ground_truth)),
        precision=float(true_positives / kept.sum()),
        recall=float(true_positives / num_ground_truth),
    )


def reliability(scores: ArrayLike, is_true_positive: ArrayLike) -> dict[str, list[float]]:
    """Per bin of score: "confidence", the mean score, "precision" and "count" of the detections.

    scores, is_true_positive: (n,), without ignored detections. CALIBRATION_BINS equal bins from 0
    to 1, of which the first begins at CALIBRATION_FLOOR. Means of empty bins are nan.
    Raises ValueError when the lengths disagree.
    """
    values, hits = _arrays(scores, is_true_positive)
    high = values >= CALIBRATION_FLOOR
    values, hits = values[high], hits[high]
    bins = np.minimum((values * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        confidence, precision = (
            np.bincount(bins, weights, minlength=CALIBRATION_BINS) / count
            for weights in (values, hits)
        )
    return {
        "confidence": confidence.tolist(),
        "precision": precision.tolist(),
        "count": count.tolist(),
    }


def expected_calibration_error(bins: Mapping[str, Sequence[float]]) -> float:
    """ECE = sum over bins of n_b / N |precision_b - confidence_b| (Guo et al. 2017); nan if N = 0.

    bins: of `reliability`. For detections precision takes the place of accuracy, and the score
    that of confidence (Kueppers et al. 2020).
    """
    columns = zip(bins["confidence"], bins["precision"], bins["count"], strict=True)
    gaps = [(abs(precision - score), count) for score, precision, count in columns if count]
    total = sum(count for _, count in gaps)
    return sum(gap * count for gap, count in gaps) / total if total else math.nan


def _arrays(scores: ArrayLike, is_true_positive: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    hits = np.asarray(is_true_positive, dtype=bool).reshape(-1)
    if len(values) != len(hits):
        raise ValueError(f"{len(values)} scores, but {len(hits)} true-positive flags")
    return values, hits
