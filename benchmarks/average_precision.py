"""Average precision of a large split: ours, VOC's and COCO's figures, beside pycocotools' COCO.

    python -m benchmarks.average_precision

5,000 images with 7 objects and 100 detections each, 20 classes. Both get the same boxes; the
COCO figures must agree.
"""

import dataclasses
import time

import numpy as np
import tyro

from data.voc import Sample
from metrics.coco import coco_average_precision
from metrics.scoring import score_detections
from tests.coco_reference import pycocotools_figures
from utils.errors import UserError, run_script

SIDE = 500  # pixels of an image


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    images: int = 5000
    detections: int = 100  # an image
    objects: int = 7  # an image
    num_classes: int = 20
    seed: int = 0


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    rng = np.random.default_rng(config.seed)
    samples = [random_sample(index, config, rng) for index in range(config.images)]
    detections = [random_detections(sample, config, rng) for sample in samples]
    names = [str(index) for index in range(config.num_classes)]

    start = time.perf_counter()
    ours = score_detections(samples, detections, names)
    ours_seconds = time.perf_counter() - start
    truth = [(sample.class_ids, sample.boxes_xyxy, sample.difficult) for sample in samples]
    start = time.perf_counter()
    coco_average_precision(detections, truth, config.num_classes)
    coco_seconds = time.perf_counter() - start
    start = time.perf_counter()
    theirs = pycocotools_figures(detections, truth, config.num_classes)[0]
    their_seconds = time.perf_counter() - start

    rows = (("pycocotools, COCO", their_seconds), ("ours, COCO", coco_seconds))
    for name, seconds in (*rows, ("ours, COCO, VOC, F1, ECE", ours_seconds)):
        print(f"{name:26s}{seconds:7.2f} s   {their_seconds / seconds:5.1f} x as fast")
    print(f"AP {ours.AP:.6f} and {theirs:.6f}; VOC AP50 {ours.AP50:.6f}")
    if abs(ours.AP - theirs) > 1e-9:
        raise UserError(f"the figures differ: {ours.AP} and {theirs}")


def random_sample(index: int, config: Config, rng: np.random.Generator) -> Sample:
    """Objects of any size anywhere."""
    corner = rng.uniform(0, 0.8 * SIDE, (config.objects, 2))
    size = rng.uniform(0.02, 0.2, (config.objects, 2)) * SIDE
    return Sample(
        image_path="",
        image_id=str(index),
        image_hw=(SIDE, SIDE),
        class_ids=rng.integers(0, config.num_classes, config.objects),
        boxes_xyxy=np.concatenate((corner, corner + size), axis=1).astype(np.float32),
        difficult=rng.random(config.objects) < 0.05,
    )


def random_detections(sample: Sample, config: Config, rng: np.random.Generator) -> np.ndarray:
    """(n, 6): boxes near the objects, mostly of their class, and boxes anywhere."""
    count = config.detections
    near = rng.integers(0, len(sample.boxes_xyxy), count)
    boxes = sample.boxes_xyxy[near] + rng.normal(0, 0.03 * SIDE, (count, 4))
    boxes = np.concatenate((boxes[:, :2], np.maximum(boxes[:, 2:], boxes[:, :2] + 1)), axis=1)
    right = rng.random(count) < 0.7
    classes = np.where(right, sample.class_ids[near], rng.integers(0, config.num_classes, count))
    scores = np.round(rng.random(count), 6)
    order = np.argsort(-scores)
    return np.c_[boxes, scores, classes][order].astype(np.float32)


if __name__ == "__main__":
    run_script(main)
