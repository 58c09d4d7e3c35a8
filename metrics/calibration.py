"""Judge a detector's confidences: thresholds of best F1, and calibration."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

DEFAULT_THRESHOLD = 0.5  # if no threshold gives a true positive
CALIBRATION_BINS = 10  # equally wide in score
# Calibration counts detections from this score on. Evaluation keeps boxes from .001 on: thousands,
# nearly all false, with scores near 0. With them every detector would look calibrated.
CALIBRATION_FLOOR = 0.05


def is_measured(metrics: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's conf_threshold is one of best F1, not DEFAULT_THRESHOLD.

    It is the default before the first evaluation, and while no evaluation finds an object.

    Args:
        metrics: The checkpoint's.
    """
    return bool(metrics.get("f1"))


class OperatingPoint(NamedTuple):
    """Metrics of the detections with score >= conf_threshold; 0 without a true positive."""

    conf_threshold: float
    f1: float
    precision: float
    recall: float


def best_f1_threshold(
    scores: ArrayLike, is_true_positive: ArrayLike, num_ground_truth: int
) -> OperatingPoint:
    """The score threshold with the highest F1 = 2 TP / (detections + ground truth).

    Args:
        scores, is_true_positive: (n,), of one class or all together, in any order, without ignored
            detections.

    Returns:
        The threshold is one of the scores; among equal F1 the highest one, which keeps the fewest
        detections. Without a true positive: (0.5, 0, 0, 0).

    Raises:
        ValueError: If the lengths differ.
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
    """F1, precision and recall at a given threshold; arguments as for `best_f1_threshold`."""
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
    """Mean score, precision and number of detections per bin of score.

    There are CALIBRATION_BINS equal bins from 0 to 1; the first one begins at CALIBRATION_FLOOR.

    Args:
        scores, is_true_positive: (n,), without ignored detections.

    Returns:
        "confidence" (the mean score), "precision" and "count" per bin; the means of empty bins are
        nan.

    Raises:
        ValueError: If the lengths differ.
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

    For detections, precision takes the place of accuracy, and the score that of confidence
    (Kueppers et al. 2020).

    Args:
        bins: As `reliability` returns them.
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
