"""Average precision of detections by the VOC devkit's rules."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metrics.coco import ImageTruth, flatten, flatten_truth

ELEVEN_RECALLS = np.linspace(0, 1, 11)


class Matches(NamedTuple):
    """The detections of one class, highest score first, each matched against the ground truth.

    Attributes:
        scores: (n,).
        true_positive, ignored: (n,) bool, never both; ignored ones overlap a difficult object.
        num_ground_truth: The objects that count, without the difficult ones.
    """

    scores: np.ndarray
    true_positive: np.ndarray
    ignored: np.ndarray
    num_ground_truth: int


class GroundTruth(NamedTuple):
    """The objects of one class, image after image: boxes (M, 4), difficult (M,)."""

    boxes: np.ndarray
    difficult: np.ndarray
    first: np.ndarray  # index of each image's first object
    counts: np.ndarray


def match_detections(
    image_ids: Sequence[Hashable],
    scores: Sequence[float],
    boxes_xyxy: Sequence,
    gt_boxes: Mapping[Hashable, Sequence],
    gt_difficult: Mapping[Hashable, Sequence],
    *,
    iou_threshold: float = 0.5,
) -> Matches:
    """Match the detections of one class by the VOC devkit's rules (VOCevaldet.m).

    By falling score (equal scores: in the given order), each detection is compared with the object
    of its image that it overlaps most. If the overlap is at least iou_threshold, it is a true
    positive, unless the object is difficult (ignored, however often) or was matched before (a false
    positive).

    Args:
        image_ids, scores, boxes_xyxy: n detections. Boxes, (n, 4), are in pixels, inclusive: the
            width is xmax - xmin + 1.
        gt_boxes, gt_difficult: Image id -> (m, 4) boxes and (m,) bools. An image that gt_boxes does
            not name has no object.

    Raises:
        ValueError: If lengths differ, or gt_difficult names other images than gt_boxes.
    """
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    ids = image_ids.tolist() if hasattr(image_ids, "tolist") else image_ids
    if not len(ids) == len(values) == len(boxes):
        raise ValueError(f"{len(ids)} image ids, {len(values)} scores and {len(boxes)} boxes")
    truth, image_of = _stack_ground_truth(gt_boxes, gt_difficult)
    images = np.array([image_of.get(name, 0) for name in ids], dtype=np.int64)
    return _judge(values, boxes, images, truth, iou_threshold)


def _judge(
    scores: np.ndarray,
    boxes: np.ndarray,
    images: np.ndarray,
    truth: GroundTruth,
    iou_threshold: float,
) -> Matches:
    """Matches of detections (n,), (n, 4), with the index of each one's image."""
    order = np.argsort(-scores, kind="stable")
    overlap, nearest = _best_overlaps(boxes[order], images[order], truth)
    hit = (overlap > 0) & (overlap >= iou_threshold)
    ignored = np.zeros_like(hit)
    ignored[hit] = truth.difficult[nearest[hit]]
    claims = np.flatnonzero(hit & ~ignored)
    true_positive = np.zeros_like(hit)
    # The first claim of each object is its true positive; np.unique returns first occurrences.
    true_positive[claims[np.unique(nearest[claims], return_index=True)[1]]] = True
    return Matches(scores[order], true_positive, ignored, int((~truth.difficult).sum()))


def precision_recall(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall, (k,) each, after each detection that is not ignored.

    Recall is nan if no object counts.
    """
    true_positives = np.cumsum(matches.true_positive[~matches.ignored])
    precision = true_positives / np.arange(1, len(true_positives) + 1)
    return precision, true_positives / (matches.num_ground_truth or np.nan)


def area_under_curve(
    precision: np.ndarray, recall: np.ndarray, *, eleven_point: bool = False
) -> float:
    """Average precision of a curve: all points (VOC 2010 on) or eleven (VOC 2007).

    All points: the area under the precision made monotonic. Eleven points: the mean over recalls
    0, .1, ..., 1 of the best precision at that recall or a higher one. The eleven recalls are the
    floats of the devkit's Python ports, in which 3 * .1 is a rounding error above 3 / 10.
    """
    if eleven_point:
        best = [precision[recall >= level].max(initial=0) for level in ELEVEN_RECALLS]
        return float(np.mean(best))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))


def match_classes(
    detections: Sequence[np.ndarray],
    ground_truth: Sequence[ImageTruth],
    num_classes: int,
    *,
    iou_threshold: float = 0.5,
) -> list[Matches]:
    """`match_detections` for every class of a whole split.

    Args:
        detections: Per image (n, 6): xyxy, score, class id.
        ground_truth: Per image, in the same order: class ids (m,), boxes (m, 4), difficult (m,).
    """
    found, images = flatten(detections, width=6)
    truth, truth_images = flatten_truth(ground_truth)
    matches = []
    for class_id in range(num_classes):
        own, real = found[:, 5] == class_id, truth[:, 5] == class_id
        counts = np.bincount(truth_images[real], minlength=len(detections))
        stacked = GroundTruth(
            truth[real, :4], truth[real, 4] > 0, np.cumsum(counts) - counts, counts
        )
        chosen = found[own]
        matches.append(_judge(chosen[:, 4], chosen[:, :4], images[own], stacked, iou_threshold))
    return matches


def _stack_ground_truth(
    gt_boxes: Mapping, gt_difficult: Mapping
) -> tuple[GroundTruth, dict[Hashable, int]]:
    """Concatenate the objects of all images, after an empty image.

    Also returns the index of each image id; 0 is the image without objects.
    """
    if gt_boxes.keys() != gt_difficult.keys():
        raise ValueError("gt_boxes and gt_difficult must name the same images")
    boxes = [
        np.zeros((0, 4)),
        *(np.asarray(box, float).reshape(-1, 4) for box in gt_boxes.values()),
    ]
    flags = [np.zeros(0, bool), *(np.asarray(gt_difficult[name], bool) for name in gt_boxes)]
    counts = np.array([len(box) for box in boxes])
    if [len(flag) for flag in flags] != counts.tolist():
        raise ValueError("gt_difficult needs one flag a box of gt_boxes")
    image_of = {name: index for index, name in enumerate(gt_boxes, start=1)}
    first = np.cumsum(counts) - counts
    truth = GroundTruth(np.concatenate(boxes), np.concatenate(flags), first, counts)
    return truth, image_of


def _best_overlaps(
    boxes: np.ndarray, images: np.ndarray, truth: GroundTruth
) -> tuple[np.ndarray, np.ndarray]:
    """The highest IoU of each detection with an object of its image, and that object's index.

    One step per rank of object (the first of every image, the second, ...), for all detections at
    once. The earlier object wins a tie, as with the devkit's `ov > ovmax`.
    """
    best = np.zeros(len(boxes))
    nearest = np.full(len(boxes), -1)
    counts = truth.counts[images]
    for rank in range(counts.max(initial=0)):
        rows = np.flatnonzero(counts > rank)
        objects = truth.first[images[rows]] + rank
        overlap = _inclusive_iou(boxes[rows], truth.boxes[objects])
        better = overlap > best[rows]
        best[rows[better]] = overlap[better]
        nearest[rows[better]] = objects[better]
    return best, nearest


def _inclusive_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """IoU of paired boxes (n, 4) -> (n,); both edges belong to a box: VOC's + 1."""
    top_left = np.maximum(boxes1[:, :2], boxes2[:, :2])
    bottom_right = np.minimum(boxes1[:, 2:], boxes2[:, 2:])
    intersection = (bottom_right - top_left + 1).clip(min=0).prod(axis=1)
    area1 = (boxes1[:, 2:] - boxes1[:, :2] + 1).prod(axis=1)
    area2 = (boxes2[:, 2:] - boxes2[:, :2] + 1).prod(axis=1)
    return intersection / (area1 + area2 - intersection)
