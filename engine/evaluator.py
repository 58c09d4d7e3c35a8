"""One evaluation for training and evaluate.py: a pass over pictures, then average precision."""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.distributed import gather_objects, rank, world_size
from engine.step import to_input
from utils.average_precision import (
    Matches,
    area_under_curve,
    coco_average_precision,
    match_classes,
    precision_recall,
)
from utils.calibration import BestF1, best_f1_threshold
from utils.dataset import VocDataset, collate, init_worker
from utils.decode import decode
from utils.errors import UserError
from utils.letterbox import letterbox_to_image
from utils.nms import non_max_suppression
from utils.voc import Sample

EVAL_CONF_THRESHOLD = 0.001
EVAL_NMS_IOU = 0.45
MATCH_IOU = 0.5
LOSS_TERMS = ("total", "loc", "conf", "cls")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model reaches on a split. Figures without a meaning there are nan.

    AP50: VOC, all points, the mean over classes with ground truth; AP, AP50_coco, AP75: COCO.
    conf_threshold: the score of best F1 over all classes at IoU .5, with its f1, precision and
    recall. highest_score: of any box, before every threshold. seconds: loading, network and NMS.
    """

    AP50: float
    AP50_11point: float
    AP: float
    AP50_coco: float
    AP75: float
    per_class: dict[str, float]  # AP50
    class_counts: dict[str, dict[str, int]]  # ground_truth, detections
    counts: dict[str, int]  # pictures, ground_truth, difficult, detections
    conf_threshold: float
    f1: float
    precision: float
    recall: float
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # class -> precision, recall, by score
    detections: Sequence[np.ndarray]  # a picture's (n, 6): xyxy in its pixels, score, class id
    highest_score: float = math.nan
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = math.nan

    @property
    def pictures_per_second(self) -> float:
        return self.counts["pictures"] / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain types for evaluation.json, without curves and boxes; nan becomes None."""
        arrays = ("curves", "detections")
        values = {name: value for name, value in vars(self).items() if name not in arrays}
        values["pictures_per_second"] = self.pictures_per_second
        values["thresholds"] = {
            "score": EVAL_CONF_THRESHOLD,
            "nms_iou": EVAL_NMS_IOU,
            "match_iou": MATCH_IOU,
        }
        return _without_nan(values)


@torch.no_grad()  # not inference_mode: a loss may cache a tensor here that training then uses
def evaluate(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    class_names: Sequence[str],
    anchors: Sequence[Sequence[float]],
    input_shape: tuple[int, int],
    scale_xy: Sequence[float],
    device: torch.device,
    batch_size: int = 8,
    num_workers: int = 0,
    loss: nn.Module | None = None,
    progress: bool = True,
) -> Evaluation:
    """Detect on all pictures and score the boxes; with `loss`, its mean from the same forward.

    Under torchrun every rank calls this, takes its share and returns the same. The modes of model
    and loss are as before afterwards. Raises UserError without pictures.
    """
    started = time.perf_counter()
    detections: list[np.ndarray] = []
    highest = torch.zeros((), device=device)
    means = LossMeans(device)
    batches = forward_batches(
        model,
        _share(samples),
        input_shape=input_shape,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    with evaluating(model, loss):
        for batch, outputs, targets in batches:
            decoded = decode(outputs, anchors, input_shape, scale_xy)
            highest = torch.maximum(highest, (decoded[..., 4] * decoded[..., 5:].amax(-1)).amax())
            kept = non_max_suppression(decoded, EVAL_CONF_THRESHOLD, EVAL_NMS_IOU)
            detections += in_picture_pixels(kept, batch, input_shape)
            if loss is not None:
                means.add(loss(outputs, targets), len(batch))
    merged, seconds = _gather_pictures(detections, len(samples)), time.perf_counter() - started
    return dataclasses.replace(
        score_detections(samples, merged, class_names),
        highest_score=float(np.max(gather_objects(highest.item()))),
        losses=means.result() if loss is not None else {},
        seconds=seconds,
    )


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    loss: nn.Module,
    device: torch.device,
    **options: Any,
) -> dict[str, float]:
    """The mean loss terms over the pictures, as `evaluate` gives them, without detections.

    options: as `forward_batches`.
    """
    means = LossMeans(device)
    with evaluating(model, loss):
        batches = forward_batches(model, _share(samples), device=device, **options)
        for batch, outputs, targets in batches:
            means.add(loss(outputs, targets), len(batch))
    return means.result()


def forward_batches(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    input_shape: tuple[int, int],
    device: torch.device,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
) -> Iterator[tuple[Sequence[Sample], Sequence[Tensor], Tensor]]:
    """Batch after batch, in order: its samples, the network's raw maps and the targets."""
    loader = DataLoader(
        VocDataset(samples, input_shape, train=False),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=init_worker,
        pin_memory=device.type == "cuda",
    )
    bar = tqdm(loader, desc="validating", unit="batch", leave=False, disable=not progress)
    for index, (images, targets) in enumerate(bar):
        outputs = model(to_input(images, device))  # float32: the mAP of training and afterwards
        first = index * batch_size
        yield samples[first : first + batch_size], outputs, targets.to(device, non_blocking=True)


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Eval mode for the block; afterwards every submodule has its own mode back.

    `module.train()` would not do: in the freeze phase the backbone stays in eval mode.
    """
    parts = [part for module in modules if module is not None for part in module.modules()]
    modes = [(part, part.training) for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class LossMeans:
    """Means of the loss terms over pictures, summed on the device and read once."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(LOSS_TERMS), device=device)
        self.pictures = 0

    def add(self, terms: Mapping[str, Tensor], pictures: int) -> None:
        self.sums += torch.stack([terms[name].float() for name in LOSS_TERMS]) * pictures
        self.pictures += pictures

    def result(self) -> dict[str, float]:
        """Over all ranks, each of which has seen as many pictures."""
        means = np.mean(gather_objects(self.sums.tolist()), axis=0) / self.pictures
        return dict(zip(LOSS_TERMS, means.tolist(), strict=True))


def in_picture_pixels(
    detections: Sequence[Tensor], samples: Sequence[Sample], input_shape: tuple[int, int]
) -> list[np.ndarray]:
    """Detections (n, 6) of a batch from the device, in pixels of the original pictures."""
    counts = [len(rows) for rows in detections]
    on_cpu = torch.cat(list(detections)).cpu().split(counts)  # one transfer a batch
    return [
        torch.cat(
            (letterbox_to_image(rows[:, :4], input_shape, sample.image_hw), rows[:, 4:]), dim=1
        ).numpy()
        for rows, sample in zip(on_cpu, samples, strict=True)
    ]


def score_detections(
    samples: Sequence[Sample], detections: Sequence[np.ndarray], class_names: Sequence[str]
) -> Evaluation:
    """VOC and COCO figures of detections: a (n, 6) xyxy, score, class id array a picture."""
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
            "pictures": len(samples),
            "ground_truth": sum(own["ground_truth"] for own in class_counts.values()),
            "difficult": sum(int(difficult.sum()) for _, _, difficult in truth),
            "detections": sum(len(rows) for rows in detections),
        },
        **_best_f1(matches.values())._asdict(),
        curves=curves,
        detections=detections,
    )


def _best_f1(matches: Iterable[Matches]) -> BestF1:
    """Over all classes together, ignored detections left out."""
    matches = list(matches)
    return best_f1_threshold(
        np.concatenate([found.scores[~found.ignored] for found in matches]),
        np.concatenate([found.true_positive[~found.ignored] for found in matches]),
        sum(found.num_ground_truth for found in matches),
    )


def format_table(evaluation: Evaluation) -> str:
    """The figures for people: a line a class, the means, and the thresholds they stand on."""
    width = max(len("class"), *(len(name) for name in evaluation.per_class))
    lines = [f"{'class':<{width}}    AP50  objects  detections"]
    for name, ap50 in evaluation.per_class.items():
        of_class = evaluation.class_counts[name]
        lines.append(
            f"{name:<{width}}  {ap50:6.4f}  {of_class['ground_truth']:7d}"
            f"  {of_class['detections']:10d}"
        )
    e, counts = evaluation, evaluation.counts
    lines += [
        "",
        f"VOC   AP50 {e.AP50:.4f}   AP50 of 11 points {e.AP50_11point:.4f}",
        f"COCO  AP {e.AP:.4f}   AP50 {e.AP50_coco:.4f}   AP75 {e.AP75:.4f}",
        f"at score >= {EVAL_CONF_THRESHOLD}, NMS IoU {EVAL_NMS_IOU}, VOC match IoU {MATCH_IOU}; "
        f"{counts['pictures']} pictures, {counts['difficult']} difficult objects left out",
        _threshold_line(evaluation),
    ]
    return "\n".join(lines)


def _threshold_line(evaluation: Evaluation) -> str:
    """The score worth using, or why there is none."""
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


def _share(samples: Sequence[Sample]) -> Sequence[Sample]:
    """This rank's pictures: every world_size-th.

    All ranks get equally many, the last one perhaps from the start again, because the loss is a
    collective call that every rank has to make equally often.
    """
    if not samples:
        raise UserError("There is no picture to evaluate on: the split is empty. Give another one.")
    count = math.ceil(len(samples) / world_size())
    return [samples[(rank() + step * world_size()) % len(samples)] for step in range(count)]


def _gather_pictures(detections: list[np.ndarray], pictures: int) -> list[np.ndarray]:
    """All ranks' detections in the order of the pictures: the inverse of `_share`."""
    parts = gather_objects(detections)
    return [parts[index % len(parts)][index // len(parts)] for index in range(pictures)]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _without_nan(value: Any) -> Any:
    """Nested dicts with None for every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
