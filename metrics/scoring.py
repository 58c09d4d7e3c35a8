"""Score a model's detections on a split: metrics for programs, and a table for people."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data.voc import Sample
from metrics.calibration import (
    CALIBRATION_FLOOR,
    OperatingPoint,
    best_f1_threshold,
    expected_calibration_error,
    operating_point,
    reliability,
)
from metrics.coco import coco_average_precision
from metrics.voc import (
    Matches,
    area_under_curve,
    match_classes,
    precision_recall,
)

EVAL_CONF_THRESHOLD = 0.001
EVAL_NMS_IOU = 0.45
MATCH_IOU = 0.5
JUDGED = ("conf_threshold", "f1", "ece")  # in metrics.csv, without the prefix "val_"
NOT_FIGURES = ("curves", "detections", "matches", "cells")  # arrays, left out of evaluation.json


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on a split; nan where a metric is undefined.

    Attributes:
        AP50: VOC, all points, the mean over classes with ground truth.
        AP, AP50_coco, AP75: COCO.
        conf_threshold: Score of best F1 over all classes at IoU .5, with its f1, precision, recall.
        class_thresholds, class_f1: Of each class alone; a class without true positives takes the
            overall threshold.
        ece, reliability: Calibration of the scores (metrics.calibration).
        highest_score: Of any box, before every threshold.
        seconds: Loading, network and NMS.
    """

    AP50: float
    AP50_11point: float
    AP: float
    AP50_coco: float
    AP75: float
    per_class: dict[str, float]  # AP50
    class_counts: dict[str, dict[str, int]]  # ground_truth, detections
    counts: dict[str, int]  # images, ground_truth, difficult, detections
    conf_threshold: float
    f1: float
    precision: float
    recall: float
    class_thresholds: dict[str, float]
    class_f1: dict[str, float]  # nan for a class without ground truth
    ece: float
    reliability: dict[str, list[float]]  # confidence, precision, count of each bin of score
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # class -> precision, recall, by score
    detections: Sequence[np.ndarray]  # an image's (n, 6): xyxy in its pixels, score, class id
    matches: dict[str, Matches]  # class -> its detections, judged at IoU .5
    highest_score: float = math.nan
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    cells: dict[str, Any] | None = None  # with a loss: CellHistogram.to_json() over the split
    seconds: float = math.nan

    @property
    def images_per_second(self) -> float:
        return self.counts["images"] / self.seconds

    def at_threshold(self, conf_threshold: float) -> OperatingPoint:
        """F1, precision and recall over all classes when scores >= conf_threshold are kept."""
        return operating_point(*_pool(self.matches.values()), conf_threshold=conf_threshold)

    def metrics(self) -> dict[str, Any]:
        """The metrics that a checkpoint stores, in plain types."""
        names = ("AP50", "AP50_11point", "AP", "AP75", "f1", "precision", "recall", "ece")
        return {
            **{name: float(getattr(self, name)) for name in names},
            "per_class": dict(self.per_class),
            "class_thresholds": dict(self.class_thresholds),
        }

    def row(self) -> dict[str, float]:
        """The metrics under their names in metrics.csv."""
        named = {f"val_{name.lower()}": getattr(self, name) for name in ("AP50", "AP", "AP75")}
        keys = {"total": "val_loss", **{name: f"val_{name}" for name in ("loc", "conf", "cls")}}
        losses = {keys[name]: value for name, value in self.losses.items() if name in keys}
        return losses | named | {name: getattr(self, name) for name in JUDGED}

    def to_json(self) -> dict[str, Any]:
        """Plain types for evaluation.json, without curves and boxes; nan becomes None."""
        values = {name: value for name, value in vars(self).items() if name not in NOT_FIGURES}
        values["images_per_second"] = self.images_per_second
        values["thresholds"] = {
            "score": EVAL_CONF_THRESHOLD,
            "nms_iou": EVAL_NMS_IOU,
            "match_iou": MATCH_IOU,
        }
        return _without_nan(values)


def score_detections(
    samples: Sequence[Sample], detections: Sequence[np.ndarray], class_names: Sequence[str]
) -> Evaluation:
    """VOC and COCO metrics of detections, per image (n, 6): xyxy, score, class id."""
    truth = [(sample.class_ids, sample.boxes_xyxy, sample.difficult) for sample in samples]
    judged = match_classes(detections, truth, len(class_names), iou_threshold=MATCH_IOU)
    matches = dict(zip(class_names, judged, strict=True))
    counted = {name: found for name, found in matches.items() if found.num_ground_truth}
    curves = {name: precision_recall(found) for name, found in counted.items()}
    per_class = {name: area_under_curve(*curve) for name, curve in curves.items()}
    eleven = [area_under_curve(*curve, eleven_point=True) for curve in curves.values()]
    coco = coco_average_precision(detections, truth, len(class_names))
    class_counts = {
        name: {"ground_truth": found.num_ground_truth, "detections": len(found.scores)}
        for name, found in matches.items()
    }
    return Evaluation(
        AP50=_mean(per_class.values()),
        AP50_11point=_mean(eleven),
        AP=coco.AP,
        AP50_coco=coco.AP50,
        AP75=coco.AP75,
        per_class={name: per_class.get(name, math.nan) for name in class_names},
        class_counts=class_counts,
        counts={
            "images": len(samples),
            "ground_truth": sum(own["ground_truth"] for own in class_counts.values()),
            "difficult": sum(int(difficult.sum()) for _, _, difficult in truth),
            "detections": sum(len(rows) for rows in detections),
        },
        **_judge_scores(matches),
        curves=curves,
        detections=detections,
        matches=matches,
    )


def _judge_scores(matches: Mapping[str, Matches]) -> dict[str, Any]:
    """Thresholds and calibration: overall and, for thresholds, per class."""
    scores, hits, objects = _pool(matches.values())
    overall = best_f1_threshold(scores, hits, objects)
    best = {name: best_f1_threshold(*_pool([found])) for name, found in matches.items()}
    bins = reliability(scores, hits)
    return {
        **overall._asdict(),
        "class_thresholds": {
            name: own.conf_threshold if own.f1 else overall.conf_threshold
            for name, own in best.items()
        },
        "class_f1": {
            name: own.f1 if matches[name].num_ground_truth else math.nan
            for name, own in best.items()
        },
        "ece": expected_calibration_error(bins),
        "reliability": bins,
    }


def _pool(matches: Iterable[Matches]) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores, true-positive flags and number of objects of all classes, without ignored ones."""
    matches = list(matches)
    return (
        np.concatenate([found.scores[~found.ignored] for found in matches]),
        np.concatenate([found.true_positive[~found.ignored] for found in matches]),
        sum(found.num_ground_truth for found in matches),
    )


def format_table(evaluation: Evaluation) -> str:
    """A table for people: a line per class, the means, and the thresholds behind them."""
    width = max(len("class"), *(len(name) for name in evaluation.per_class))
    lines = [f"{'class':<{width}}    AP50  objects  detections  best F1  at score"]
    for name, ap50 in evaluation.per_class.items():
        of_class = evaluation.class_counts[name]
        lines.append(
            f"{name:<{width}}  {ap50:6.4f}  {of_class['ground_truth']:7d}"
            f"  {of_class['detections']:10d}"
            f"  {evaluation.class_f1[name]:7.4f}  {evaluation.class_thresholds[name]:8.4f}"
        )
    e, counts = evaluation, evaluation.counts
    lines += [
        "",
        f"VOC   AP50 {e.AP50:.4f}   AP50 of 11 points {e.AP50_11point:.4f}",
        f"COCO  AP {e.AP:.4f}   AP50 {e.AP50_coco:.4f}   AP75 {e.AP75:.4f}",
        f"at score >= {EVAL_CONF_THRESHOLD}, NMS IoU {EVAL_NMS_IOU}, VOC match IoU {MATCH_IOU}; "
        f"{counts['images']} images, {counts['difficult']} difficult objects left out",
        f"expected calibration error {e.ece:.4f} over {sum(e.reliability['count'])} boxes of "
        f"score >= {CALIBRATION_FLOOR}",
        _threshold_line(evaluation),
    ]
    return "\n".join(lines)


def _threshold_line(evaluation: Evaluation) -> str:
    """The recommended score threshold, or why there is none."""
    if evaluation.counts["detections"] == 0:
        return (
            f"No box has a score of {EVAL_CONF_THRESHOLD} or more: the highest seen is "
            f"{evaluation.highest_score:.2g}. Train longer, or check the weights."
        )
    if evaluation.f1 == 0:
        return (
            f"No box lies on an object (highest score {evaluation.highest_score:.2g}): "
            f"there is no best threshold, {evaluation.conf_threshold} stands in."
        )
    return (
        f"best F1 {evaluation.f1:.4f} at score >= {evaluation.conf_threshold:.4f}: "
        f"precision {evaluation.precision:.4f}, recall {evaluation.recall:.4f}"
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _without_nan(value: Any) -> Any:
    """Nested dicts and lists with None for every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
