"""Where a detector loses its objects, and what its hardest negatives are, before any threshold.

python -m benchmarks.lost_objects --weights A/best.pt B/best.pt --data VOCdevkit/BCCD:test
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torchvision.ops import box_iou

from data.letterbox import image_to_letterbox
from data.voc import Sample, scan_split
from losses.conf.cells import ConfCells
from losses.yolo_loss import YOLOLoss
from metrics.evaluator import forward_batches
from nets.decode import decode
from utils.distributed import select_device
from utils.errors import run_script
from weights.checkpoint import build_model, read_checkpoint

ON_IT = 0.5  # IoU from which a box lies on an object
HARDEST = 0.01  # share of the negatives that is looked at


@dataclass(frozen=True)
class Config:
    # Every line is also a flag; its comment is the flag's help.
    weights: tuple[str, ...]  # checkpoints of runs to compare
    data: str  # split, ROOT:SPLIT
    device: str = ""  # cpu or cuda; "" takes a GPU when there is one


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    device = select_device(config.device)
    for path in config.weights:
        checkpoint = read_checkpoint(path)
        names = checkpoint["class_names"]
        samples, _ = scan_split(config.data, names, classes_path=path)
        objects, negatives = look(checkpoint, samples, device)
        print(f"\n{path} ({checkpoint['conf_loss']})")
        print("of the most objective box on each object, IoU >= .5:")
        print(f"{'class':16} objects  with a box  objectness  P(own class)  rightly named")
        for index, name in enumerate(names):
            own = objects[objects[:, 0] == index, 1:]
            if len(own):
                shares = " ".join(f"{value:12.3f}" for value in own.mean(axis=0))
                print(f"{name:16} {len(own):7}{shares}")
        hard = negatives[np.argsort(-negatives[:, 0])[: max(1, round(HARDEST * len(negatives)))]]
        print(
            f"the hardest {HARDEST:.0%} of {len(negatives)} negatives: objectness "
            f"{hard[:, 0].mean():.3f}, IoU with an object {hard[:, 1].mean():.3f} in the mean, "
            f"{(hard[:, 1] >= 0.3).mean():.0%} with .3 or more; "
            f"of all negatives {(negatives[:, 1] >= 0.3).mean():.1%}"
        )


@torch.no_grad()
def look(
    checkpoint: Mapping[str, Any], samples: Sequence[Sample], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Objects (n, 5): class, and of the box on it: is there one, objectness, own class, name.

    Negatives (m, 2) that the training would count: objectness, best IoU with an object.
    """
    anchors, input_hw = checkpoint["anchors"], tuple(checkpoint["input_shape"])
    model, loss = build_model(checkpoint, device), training_loss(checkpoint).to(device)
    objects, negatives = [], []
    batches = forward_batches(model, samples, input_shape=input_hw, device=device)
    for batch, outputs, targets in batches:
        decoded = decode(outputs, anchors, input_hw, checkpoint["scale_xy"]).cpu()
        cells: ConfCells = loss(outputs, targets, cells=True)["cells"]
        is_negative = (cells.counted & ~cells.positive).cpu()
        for sample, boxes, negative in zip(batch, decoded, is_negative, strict=True):
            truth_xyxy = torch.from_numpy(sample.boxes_xyxy).float()
            truth_xyxy = image_to_letterbox(truth_xyxy, sample.image_hw, input_hw)
            overlaps = box_iou(truth_xyxy, boxes[:, :4])
            pairs = zip(overlaps >= ON_IT, sample.class_ids.tolist(), strict=True)
            objects += [[class_id, *best_box(boxes[on], class_id)] for on, class_id in pairs]
            nearest = overlaps.amax(0) if len(overlaps) else torch.zeros(len(boxes))
            negatives.append(torch.stack((boxes[:, 4], nearest), dim=1)[negative])
    return np.array(objects).reshape(-1, 5), torch.cat(negatives).numpy()


def training_loss(checkpoint: Mapping[str, Any]) -> YOLOLoss:
    """A loss that assigns and ignores as the checkpoint's training did, with plain BCE."""
    config = checkpoint["config"]
    knobs = ("assigner", "anchor_threshold", "ignore_threshold")
    return YOLOLoss(
        checkpoint["anchors"],
        len(checkpoint["class_names"]),
        tuple(checkpoint["input_shape"]),
        scale_xy=checkpoint["scale_xy"],
        **{name: config[name] for name in knobs},
    )


def best_box(boxes: Tensor, class_id: int) -> tuple[float, float, float, float]:
    """Of the (n, 5 + C) decoded boxes on an object, the one of highest objectness."""
    if not len(boxes):
        return 0.0, 0.0, 0.0, 0.0
    best = boxes[boxes[:, 4].argmax()]
    right = float(best[5:].argmax() == class_id)
    return 1.0, float(best[4]), float(best[5 + class_id]), right


if __name__ == "__main__":
    run_script(main)
