"""What a detector's confidences are worth."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DEFAULT_THRESHOLD = 0.5  # where no threshold finds anything true


class BestF1(NamedTuple):
    """The score threshold of the highest F1, and what keeping scores >= threshold gives there."""

    conf_threshold: float
    f1: float
    precision: float
    recall: float


def best_f1_threshold(
    scores: Sequence[float], is_true_positive: Sequence[bool], num_ground_truth: int
) -> BestF1:
    """The score at which F1 = 2 TP / (detections + ground truth) is highest.

    scores, is_true_positive: (n,), all classes together, in any order, without ignored detections.
    The threshold is one of the scores; among equal F1 the highest one, which keeps the fewest
    detections. With no true positive there is nothing to choose by: (0.5, 0, 0, 0).
    Raises ValueError when the lengths disagree.
    """
    scores = np.asarray(scores, dtype=np.float64).reshape(-1)
    hits = np.asarray(is_true_positive, dtype=bool).reshape(-1)
    if len(scores) != len(hits):
        raise ValueError(f"{len(scores)} scores, but {len(hits)} true-positive flags")
    if not hits.any():
        return BestF1(DEFAULT_THRESHOLD, 0.0, 0.0, 0.0)
    order = np.argsort(-scores, kind="stable")
    # Equal scores pass a threshold together: only the last of each run can be a cut.
    cuts = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    true_positives, kept = np.cumsum(hits[order])[cuts], cuts + 1
    f1 = 2 * true_positives / (kept + num_ground_truth)
    best = int(f1.argmax())
    return BestF1(
        conf_threshold=float(scores[order][cuts[best]]),
        f1=float(f1[best]),
        precision=float(true_positives[best] / kept[best]),
        recall=float(true_positives[best] / num_ground_truth),
    )
