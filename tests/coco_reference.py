"""COCO's own figures, by pycocotools: the oracle of tests and benchmarks."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

from metrics.coco import ImageTruth


def pycocotools_figures(
    detections: Sequence[np.ndarray], ground_truth: Sequence[ImageTruth], num_classes: int
) -> tuple[float, ...]:
    """AP, AP50, AP75; arguments as of `coco_average_precision`."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_dataset(ground_truth, num_classes)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(coco_results(detections)), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    parts = (precision, precision[0], precision[5])
    return tuple(float(part[part > -1].mean()) for part in parts)


def coco_dataset(ground_truth: Sequence[ImageTruth], num_classes: int) -> dict:
    """Ground truth as COCO's dictionary; an image's id is its index. See above for the shapes."""
    annotations: list[dict] = []
    for image, (class_ids, boxes_xyxy, difficult) in enumerate(ground_truth):
        for class_id, box, crowd in zip(class_ids, boxes_xyxy, difficult, strict=True):
            left, top, right, bottom = (float(edge) for edge in box)
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 would read as "not matched"
                    "image_id": image,
                    "category_id": int(class_id),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": int(crowd),
                }
            )
    return {
        "info": {},
        "images": [{"id": image} for image in range(len(ground_truth))],
        "categories": [{"id": index, "name": str(index)} for index in range(num_classes)],
        "annotations": annotations,
    }


def coco_results(detections: Sequence[np.ndarray]) -> list[dict]:
    """Detections, an (n, 6) array an image, as COCO's list of results."""
    return [
        {
            "image_id": image,
            "category_id": int(class_id),
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for image, rows in enumerate(detections)
        for left, top, right, bottom, score, class_id in rows.tolist()
    ]
